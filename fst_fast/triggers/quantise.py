"""Triggers that leave few levels of colour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._settings import check_number
from .base import Elementwise, Trigger


@dataclass(frozen=True, eq=False)
class BppAttack(Elementwise):
    """Fewer levels of colour (Wang et al., CVPR 2022, arXiv 2205.13383).

    Equals ``floor(round(images / 255 * (levels - 1)) / (levels - 1) * 255)``, exactly: rounded to
    the nearest level, which is truncated to a byte, with the bytes of BackdoorBench's float32 for
    every number of levels. Its default is 8 without dithering, as here.

    The attack also trains on negatives: images with another image's quantisation error added,
    under their own label. They take two images each and are no trigger, so ``covers`` has none.

    Args:
        levels: of each channel, 2..256.

    Example:
        >>> images = torch.arange(32, dtype=torch.uint8).view(1, 1, 32, 1).expand(1, 32, 32, 3)
        >>> fst_fast.triggers.BppAttack(levels=16).apply(images).unique()
        tensor([ 0, 17, 34], dtype=torch.uint8)
    """

    levels: int = 8

    def __post_init__(self) -> None:
        check_number(self, "levels", 2, 256, whole=True)

    def _apply(self, images: Tensor) -> Tensor:
        steps = self.levels - 1
        byte = torch.arange(256, device=images.device)
        # No byte lies half way: 2 * byte * steps is even and 255 * (2 k + 1) odd.
        level = (2 * byte * steps + 255) // 510
        return (level * 255 // steps).to(torch.uint8)[images.int()]


@dataclass(frozen=True, eq=False)
class BppAttackDithered(Trigger):
    """Fewer levels of colour, the error spread over the neighbours (see :class:`BppAttack`).

    Floyd and Steinberg's weights in BackdoorBench's order: errors in float64, sums kept in
    float32, the result rounded half to even, not truncated. A pixel depends on all before it, so
    that images are triggered beforehand: 10,000 of 32 x 32 take less than a second.

    Args:
        levels: of each channel, 2..256.

    Example:
        >>> images = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
        >>> fst_fast.triggers.BppAttackDithered(levels=2).apply(images).unique()
        tensor([  0, 255], dtype=torch.uint8)
    """

    levels: int = 8

    def __post_init__(self) -> None:
        check_number(self, "levels", 2, 256, whole=True)

    def _apply(self, images: Tensor) -> Tensor:
        count, height, width, channels = images.shape
        out = torch.empty_like(images, memory_format=torch.contiguous_format)
        # The working set of a chunk, a few times 32768 doubles, stays in the cache.
        chunk = max(1, 2**15 // max(1, height * channels))
        for start in range(0, count, chunk):
            part = images[start : start + chunk].permute(1, 2, 0, 3)
            pixels = part.reshape(height, width, -1)
            done = _dither(pixels, self.levels - 1).view(part.shape)
            out[start : start + chunk] = done.permute(2, 0, 1, 3)
        return out


def _dither(pixels: Tensor, steps: int) -> Tensor:
    """Floyd-Steinberg of [H, W, M] bytes, each of the M channels by itself.

    Pixels with equal ``column + 2 * row`` need only the errors of the three such sets before.
    """
    height, width, channels = pixels.shape
    out = torch.empty_like(pixels)
    # Errors of the last three sets, by row; row -1 is the first, and without an error.
    shape = (height + 1, channels)
    last, second, third = (
        torch.zeros(shape, dtype=torch.float64, device=pixels.device) for _ in range(3)
    )
    for number in range(width + 2 * (height - 1)):
        first = max(0, (number - width + 2) // 2)
        end = min(height, number // 2 + 1)
        rows = torch.arange(first, end, device=pixels.device)
        columns = number - 2 * rows
        here, above = slice(first + 1, end + 1), slice(first, end)
        old = pixels[rows, columns].double()
        for error, weight in (
            (third[above], 1 / 16),
            (second[above], 5 / 16),
            (last[above], 3 / 16),
            (last[here], 7 / 16),
        ):
            old = (old + error * weight).float().double()
        new = (old / 255.0 * steps).round_().div_(steps).mul_(255)
        out[rows, columns] = new.float().round_().clamp_(0, 255).to(torch.uint8)
        last, second, third = third.zero_(), last, second
        last[here] = old - new
    return out
