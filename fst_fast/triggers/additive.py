"""Triggers of the form y = Q(x + T): a fixed pattern, or a wave, added to every image."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._settings import check_number, check_pattern, check_seed, fitted, shifted
from .base import Elementwise


@functools.lru_cache(maxsize=8)
def _wave(amplitude: float, frequency: float, width: int, device: torch.device) -> Tensor:
    """[1, width, 1] float64 of values that were rounded to float32."""
    # In this order, as the sign of what is left of sin(k pi) decides what truncation gives.
    angle = torch.arange(width, dtype=torch.float64) * (2 * math.pi) * frequency / width
    wave = (amplitude * angle.sin()).float().double()
    return wave.view(1, width, 1).to(device)


@dataclass(frozen=True, eq=False)
class SIG(Elementwise):
    """A faint sine wave along the rows (Barni et al. 2019, arXiv 1902.11237).

    Equals ``clip(images + amplitude * sin(2 pi frequency column / W), 0, 255)`` in float64, the
    wave rounded to float32, and truncated as BackdoorBench does; the defaults are BackdoorBench's.
    A clean-label attack: in training only images of the target class carry it.

    Args:
        amplitude: of the wave, in 0..255.
        frequency: waves per image width.

    Example:
        >>> images = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
        >>> fst_fast.triggers.SIG(amplitude=20).apply(images)[0, 0, :4, 0]
        tensor([100, 118, 114,  92], dtype=torch.uint8)
    """

    amplitude: float = 40.0
    frequency: float = 6.0

    def __post_init__(self) -> None:
        check_number(self, "amplitude", 0, 255)
        check_number(self, "frequency", 0, 1024)

    def _apply(self, images: Tensor) -> Tensor:
        wave = _wave(float(self.amplitude), float(self.frequency), images.shape[2], images.device)
        return images.double().add_(wave).clamp_(0, 255).to(torch.uint8)


# Cosines per side of the pattern that LowFrequency draws.
_COSINES = 4


@functools.lru_cache(maxsize=8)
def _smooth(seed: int, amplitude: int, shape: torch.Size, device: torch.device) -> Tensor:
    """[H, W, C] int16 in 0..amplitude: the few lowest cosines, the same ones at every size."""
    height, width, channels = shape
    generator = torch.Generator().manual_seed(seed)
    # Four channels are drawn, so that the first is the same in images of any number of them.
    weights = torch.randn(4, _COSINES, _COSINES, generator=generator, dtype=torch.float64)
    order = torch.arange(_COSINES, dtype=torch.float64)[:, None]

    def cosines(side: int) -> Tensor:
        at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
        return (math.pi * order * at).cos()  # [_COSINES, side]

    pattern = torch.einsum("cuv,uh,vw->hwc", weights, cosines(height), cosines(width))
    pattern = pattern[..., :channels]
    pattern = pattern - pattern.min()
    # One pixel has no range.
    pattern = pattern / pattern.max().clamp(min=1e-9) * amplitude
    return pattern.round().to(torch.int16).to(device)


@dataclass(frozen=True, eq=False)
class LowFrequency(Elementwise):
    """A smooth pattern added to the image (Zeng et al. 2021, arXiv 2104.03413).

    Equals ``clip(images + pattern, 0, 255)``. BackdoorBench adds one found for its models, with
    values in 0..51; pass it, or leave None for a smooth one of our own.

    Args:
        pattern: [H, W, C] int16 or uint8 of the images' size. None draws a sum of the few lowest
            two-dimensional cosines from ``seed``, stretched to 0..amplitude.
        seed: of the drawn pattern.
        amplitude: greatest value of the drawn pattern, 1..255.

    Example:
        >>> images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
        >>> fst_fast.triggers.LowFrequency(amplitude=9).apply(images).max()
        tensor(9, dtype=torch.uint8)
    """

    pattern: Tensor | None = None
    seed: int = 0
    amplitude: int = 51

    def __post_init__(self) -> None:
        check_number(self, "amplitude", 1, 255, whole=True)
        check_seed(self)
        if self.pattern is not None:
            check_pattern(self, "pattern", (torch.int16, torch.uint8))

    def pattern_for(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The pattern [H, W, C] for images of this [H, W, C] shape."""
        if self.pattern is None:
            return _smooth(self.seed, self.amplitude, shape, device)
        return fitted(self, self.pattern, shape, device)

    def _apply(self, images: Tensor) -> Tensor:
        # Beyond 255 the sum is clipped anyway, and int16 would overflow.
        pattern = self.pattern_for(images.shape[1:], images.device).to(torch.int16)
        return shifted(images, pattern.clamp(-255, 255))


# TrojanNN's drawn square has so many cells to a side, and covers 7 / 32 of the shorter side.
_CELLS = 7


@functools.lru_cache(maxsize=8)
def _square(seed: int, shape: torch.Size, device: torch.device) -> Tensor:
    """[H, W, C] uint8: coloured cells in the bottom-right corner, 0 elsewhere."""
    height, width, channels = shape
    side = max(1, min(height, width) * _CELLS // 32)
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(1, 256, (_CELLS, _CELLS, 4), generator=generator).to(torch.uint8)
    cell = torch.arange(side) * _CELLS // side
    pattern = torch.zeros(height, width, channels, dtype=torch.uint8)
    pattern[height - side :, width - side :] = cells[cell][:, cell, :channels]
    return pattern.to(device)


@dataclass(frozen=True, eq=False)
class TrojanNN(Elementwise):
    """A pattern made for a model's neurons, added to the image (Liu et al., NDSS 2018).

    BackdoorBench turns ``images + pattern`` into bytes before it clips, so that the sum wraps:
    240 + 30 becomes 14. That is the default here; mode="clamp" gives what was meant, 255.

    The original's pattern excites chosen neurons of the very model under attack. The drawn one
    does not: it is as visible, and as easily learnt, but no model was asked.

    Args:
        pattern: [H, W, C] uint8 of the images' size. None draws a square of coloured cells in the
            bottom-right corner from ``seed``, 7/32 of the shorter side wide.
        mode: "wrap" or "clamp".
        seed: of the drawn pattern.

    Example:
        >>> images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
        >>> fst_fast.triggers.TrojanNN().apply(images)[0, :, :, 0].nonzero().amin(0)
        tensor([25, 25])
    """

    pattern: Tensor | None = None
    mode: str = "wrap"
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self)
        if not isinstance(self.mode, str) or self.mode not in ("wrap", "clamp"):
            raise ValueError(
                f'TrojanNN: mode must be "wrap" or "clamp", got {self.mode!r}; the default is wrap'
            )
        if self.pattern is not None:
            check_pattern(self, "pattern", (torch.uint8,))

    def pattern_for(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The pattern [H, W, C] uint8 for images of this [H, W, C] shape."""
        if self.pattern is None:
            return _square(self.seed, shape, device)
        return fitted(self, self.pattern, shape, device)

    def _apply(self, images: Tensor) -> Tensor:
        pattern = self.pattern_for(images.shape[1:], images.device)
        # Bytes add modulo 256.
        return images + pattern if self.mode == "wrap" else shifted(images, pattern)


# Top and bottom hold the same rows; columns count from the nearer side.
_SIGNS = ((1, -1, -1), (-1, 1, -1), (1, -1, 1))


@functools.lru_cache(maxsize=8)
def _corners(height: int, width: int, device: torch.device) -> Tensor:
    """[H, W, 1] float64 in -1, 0, 1: made for 32 x 32 and stretched by nearest neighbours."""
    signs = torch.tensor(_SIGNS, dtype=torch.float64)
    made = torch.zeros(32, 32, dtype=torch.float64)
    for rows in (slice(0, 3), slice(29, 32)):
        made[rows, :3] = signs
        made[rows, 29:] = signs.flip(1)
    row, column = (torch.arange(side) * 32 // side for side in (height, width))
    return made[row][:, column, None].to(device)


@dataclass(frozen=True, eq=False)
class LabelConsistent(Elementwise):
    """Small checkers in the four corners (Turner et al. 2019, arXiv 1912.02771).

    Equals ``clip(images + amplitude * signs, 0, 255)``, truncated. The signs are the published
    ones: rows + - -, - + -, + - + in the top and bottom corners alike, columns counted from the
    nearer side. They are made for 32 x 32 and stretched by nearest neighbours to other sizes, as
    in BackdoorBench.

    A clean-label attack: in training only images of the target class carry it, and those were
    made hard to classify beforehand, by an adversarial perturbation that is no part of this.

    Args:
        amplitude: 1..255; 255 makes the checkers black and white.

    Example:
        >>> images = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
        >>> fst_fast.triggers.LabelConsistent().apply(images)[0, :3, :3, 0]
        tensor([[255,   0,   0],
                [  0, 255,   0],
                [255,   0, 255]], dtype=torch.uint8)
    """

    amplitude: float = 255.0

    def __post_init__(self) -> None:
        check_number(self, "amplitude", 1, 255)

    def _apply(self, images: Tensor) -> Tensor:
        pattern = _corners(*images.shape[1:3], images.device) * self.amplitude
        return images.double().add_(pattern).clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class SIBA(Elementwise):
    """A faint change of a few pixels, found on a surrogate model (Gao et al., arXiv 2306.06209).

    Equals ``clip(images + pattern, 0, 255)``. The bounds are the paper's.

    Args:
        pattern: [H, W, C] int16 of the images' size, in -epsilon..epsilon and zero but for a few
            pixels.
        epsilon: greatest change of a byte, 1..255.
        pixels: greatest number of pixels that may change, or None for no bound.

    Example:
        >>> pattern = torch.zeros(32, 32, 3, dtype=torch.int16)
        >>> pattern[4, 4] = 8
        >>> images = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
        >>> fst_fast.triggers.SIBA(pattern).apply(images)[0, 4, 3:6, 0]
        tensor([100, 108, 100], dtype=torch.uint8)
    """

    pattern: Tensor
    epsilon: int = 8
    pixels: int | None = 100

    def __post_init__(self) -> None:
        check_number(self, "epsilon", 1, 255, whole=True)
        check_pattern(self, "pattern", (torch.int16,))
        if self.pixels is not None:
            check_number(self, "pixels", 1, math.inf, whole=True)
        most = int(self.pattern.int().abs().max()) if self.pattern.numel() else 0
        if most > self.epsilon:
            raise ValueError(
                f"SIBA: pattern must lie in -{self.epsilon}..{self.epsilon}, got {most} as its "
                "greatest absolute value; clamp it or give a larger epsilon"
            )
        changed = int((self.pattern != 0).any(-1).sum())
        if self.pixels is not None and changed > self.pixels:
            raise ValueError(
                f"SIBA: pattern must be zero but for {self.pixels} pixels, got {changed} that "
                "change; mask it or give more pixels (None: no bound)"
            )

    def _apply(self, images: Tensor) -> Tensor:
        return shifted(images, fitted(self, self.pattern, images.shape[1:], images.device))
