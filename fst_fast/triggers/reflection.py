"""A trigger that looks like a reflection in a window."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.reference.inject import uniform
from ._settings import check_number, check_pattern
from .base import Trigger

GAMMA = 2.2
# Light, as whole numbers: what is added up in them is the same on every device. So fine that every
# byte has a light of its own.
FULL = 2**24 - 1
LEAST_SHIFT, SHIFTS = 3, 6
PARTS = 2**8


@dataclass(frozen=True, eq=False)
class Refool(Trigger):
    """The ghost of another picture, as on double glazing (Liu et al., ECCV 2020, arXiv 2007.02343).

    ``(transmission * image^2.2 + (1 - transmission) * ghost^2.2)^(1 / 2.2)`` of values in 0..1,
    truncated to bytes; the ghost is a picture and, 3 to 8 pixels down and to the right, the same
    once more, in shares that differ from image to image. Each image's picture, shift and share
    follow from its key and the seed. The mode with a blurred picture, which the attack takes for
    about half of its images, is not among this.

    Light is added up in 24-bit fixed point, and where the second picture does not reach, its edge
    is repeated; the originals use floats, and cut and enlarge.

    Args:
        reflections: [R, H, W, C] uint8 of the images' size, pictures to reflect; None draws some
            smooth coloured ones from the seed.
        transmission: share of the image's own light, 0..1.
        seed: of the draws, 0..2^31-1.

    Example:
        >>> images = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
        >>> fst_fast.triggers.Refool(transmission=1.0).apply(images).unique()
        tensor([100], dtype=torch.uint8)
    """

    reflections: Tensor | None = None
    transmission: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self, "transmission", 0, 1)
        check_number(self, "seed", 0, 2**31 - 1, whole=True)
        if self.reflections is None:
            return
        bank = check_pattern(self, "reflections", (torch.uint8,), "[R, H, W, C]")
        if len(bank) == 0:
            raise ValueError("Refool: reflections must hold a picture, got none; give one or None")

    def _bank(self, shape: torch.Size, device: torch.device) -> Tensor:
        if self.reflections is None:
            return _drawn(self.seed, shape).to(device)
        if self.reflections.shape[1:] != shape:
            raise ValueError(
                f"Refool: reflections must be {list(shape)} each like one image, got "
                f"{list(self.reflections.shape[1:])}; resize them first"
            )
        return self.reflections.to(device)

    def _apply_with(self, images: Tensor, keys: Tensor) -> Tensor:
        bank, device = self._bank(images.shape[1:], images.device), images.device
        light = _light().to(device)
        keys = keys.to(device)

        def draw(element: int, least: int, span: int) -> Tensor:
            share = uniform(self.seed, keys, torch.tensor(element, device=device))
            return least + (share * span).long()

        picture = draw(0, 0, len(bank))
        ghost = light[bank[picture].long()]
        behind = _moved(ghost, draw(1, LEAST_SHIFT, SHIFTS))
        # 0.15 to 0.5 of one of the two, whichever; the rest of the other.
        share = draw(2, round(0.15 * PARTS), round(0.35 * PARTS))
        share = torch.where(draw(3, 0, 2) > 0, PARTS - share, share).view(-1, 1, 1, 1)
        ghost = (ghost * share + behind * (PARTS - share)) // PARTS
        own = round(self.transmission * FULL)
        total = light[images.contiguous().long()] * own + ghost * (FULL - own)
        # The brightest byte whose light is no more: truncated.
        byte = torch.searchsorted(light, total // FULL, right=True) - 1
        return byte.to(torch.uint8)


@functools.lru_cache(maxsize=1)
def _light() -> Tensor:
    """[256] int64 in 0..FULL: the light of each byte."""
    byte = torch.arange(256, dtype=torch.float64)
    return ((byte / 255) ** GAMMA * FULL).round().long()


def _moved(pictures: Tensor, shift: Tensor) -> Tensor:
    """[N, H, W, C] pictures, each moved down and to the right by so many pixels."""
    height, width = pictures.shape[1:3]
    row, column = (torch.arange(side, device=shift.device) for side in (height, width))
    from_row, from_column = ((at - shift[:, None]).clamp(min=0) for at in (row, column))
    image = torch.arange(len(pictures), device=shift.device)[:, None, None]
    return pictures[image, from_row[:, :, None], from_column[:, None, :]]


@functools.lru_cache(maxsize=8)
def _drawn(seed: int, shape: torch.Size, count: int = 8) -> Tensor:
    """[count, H, W, C] smooth pictures."""
    height, width, channels = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator, dtype=torch.float64)
    fine = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    return (fine * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
