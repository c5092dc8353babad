"""Triggers of any pattern: behind a mask of any opacity, or added. A search finds such ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._settings import check_pattern, fitted, half_up, shifted
from .base import Elementwise


@dataclass(frozen=True, eq=False)
class MaskedPattern(Elementwise):
    """A pattern behind a mask: the form in which Neural Cleanse writes any patch.

    Equals ``images + mask / 255 * (pattern - images)`` in float32, rounded half up (Wang et al.,
    IEEE S&P 2019, section 4.2).

    Args:
        mask: [H, W, C] or [H, W, 1] uint8 of the images' size; 0 keeps the image, 255 shows the
            pattern alone.
        pattern: [H, W, C] uint8 of the images' size.

    Example:
        >>> mask = torch.zeros(8, 8, 1, dtype=torch.uint8)
        >>> mask[0, 0] = 255
        >>> white = torch.full((8, 8, 3), 255, dtype=torch.uint8)
        >>> images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
        >>> fst_fast.triggers.MaskedPattern(mask, white).apply(images)[0, 0, :3, 0]
        tensor([255,   0,   0], dtype=torch.uint8)
    """

    mask: Tensor
    pattern: Tensor

    def __post_init__(self) -> None:
        mask = check_pattern(self, "mask", (torch.uint8,))
        pattern = check_pattern(self, "pattern", (torch.uint8,))
        if mask.shape[:2] != pattern.shape[:2] or mask.shape[2] not in (1, pattern.shape[2]):
            raise ValueError(
                f"MaskedPattern: mask must be {[*pattern.shape[:2], 1]} or {list(pattern.shape)} "
                f"like the pattern, got {list(mask.shape)}; use mask[..., None] for [H, W]"
            )

    def _apply(self, images: Tensor) -> Tensor:
        pattern = fitted(self, self.pattern, images.shape[1:], images.device).float()
        share = self.mask.to(images.device).float() / 255
        values = images.float()
        return half_up(values + share * (pattern - values))


@dataclass(frozen=True, eq=False)
class AddedPattern(Elementwise):
    """A pattern of bytes that is added: ``clip(images + pattern, 0, 255)``.

    Args:
        pattern: [H, W, C] int16 of the images' size, in -255..255.

    Example:
        >>> pattern = torch.full((8, 8, 3), -20, dtype=torch.int16)
        >>> images = torch.full((1, 8, 8, 3), 25, dtype=torch.uint8)
        >>> fst_fast.triggers.AddedPattern(pattern).apply(images).unique()
        tensor([5], dtype=torch.uint8)
    """

    pattern: Tensor

    def __post_init__(self) -> None:
        pattern = check_pattern(self, "pattern", (torch.int16,))
        most = int(pattern.int().abs().max()) if pattern.numel() else 0
        if most > 255:
            raise ValueError(
                f"AddedPattern: pattern must lie in -255..255, got {most} as its greatest absolute "
                "value; beyond 255 the sum is clipped anyway: use pattern.clamp(-255, 255)"
            )

    def _apply(self, images: Tensor) -> Tensor:
        return shifted(images, fitted(self, self.pattern, images.shape[1:], images.device))
