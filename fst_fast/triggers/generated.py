"""Triggers that a network makes for each image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..heads.contexts import evaluating
from .base import Trigger
from .pixels import Normalization, normalize_bytes, recover_bytes

# Images that go through the networks at a time.
BATCH = 256


@dataclass(frozen=True, eq=False)
class InputAware(Trigger):
    """A pattern and a mask of each image's own (Nguyen and Tran, NeurIPS 2020, arXiv 2010.08138).

    ``x + (generator(x) - x) * mask(x)`` of the normalised image x, back to the nearest bytes. The
    networks are those that the attacker trained, and are given; they run in eval mode and stay as
    they are.

    A frozen trigger gives one result for each stored image, so :class:`fst_fast.DeviceLoader`
    makes it once and looks it up from then on: cheaper than blending the networks' outputs again
    in every batch, however that were fused.

    Args:
        generator: [N, C, H, W] normalised float32 to patterns of the same shape.
        mask: the same to [N, 1 or C, H, W] in 0..1.
        normalize: (mean, std) per channel in units of 0..1 that the networks were trained with;
            None for 0..1.

    Example:
        >>> white = torch.nn.Threshold(2.0, 1.0)
        >>> mask = torch.nn.Threshold(2.0, 0.5)
        >>> images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
        >>> fst_fast.triggers.InputAware(white, mask).apply(images).unique()
        tensor([128], dtype=torch.uint8)
    """

    generator: nn.Module
    mask: nn.Module
    normalize: Normalization | None = None

    def __post_init__(self) -> None:
        for name in ("generator", "mask"):
            network = getattr(self, name)
            if not isinstance(network, nn.Module):
                raise ValueError(
                    f"InputAware: {name} must be a torch.nn.Module, got {type(network).__name__}"
                )

    def _apply(self, images: Tensor) -> Tensor:
        with (
            torch.no_grad(),
            evaluating(self.generator, images.device),
            evaluating(self.mask, images.device),
        ):
            parts = [self._some(part) for part in images.split(BATCH)]
        return torch.cat(parts) if parts else images.clone()

    def _some(self, images: Tensor) -> Tensor:
        x = normalize_bytes(images, self.normalize)
        pattern = self._run("generator", x, (x.shape[1],))
        share = self._run("mask", x, (1, x.shape[1]))
        return recover_bytes(x + (pattern - x) * share, self.normalize)

    def _run(self, name: str, x: Tensor, channels: tuple[int, ...]) -> Tensor:
        out = getattr(self, name)(x)
        wanted = [(len(x), count, *x.shape[2:]) for count in channels]
        if not isinstance(out, Tensor) or tuple(out.shape) not in wanted:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"InputAware: {name} must give a tensor {list(wanted[0])} for images "
                f"{list(x.shape)}, got {got}; check that it is the attack's own network"
            )
        return out.to(x.dtype)
