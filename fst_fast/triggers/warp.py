"""Triggers that move pixels."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ._settings import check_number
from .base import Gather, Trigger, Warp, WarpField


@functools.lru_cache(maxsize=8)
def _coordinates(strength: float, grid: int, seed: int, height: int, width: int) -> Tensor:
    """[H, W, 2] float32, row and column in pixels."""
    generator = torch.Generator().manual_seed(seed)
    # [1, 2, grid, grid]: by column, then by row, as grid_sample counts.
    noise = torch.rand(1, 2, grid, grid, generator=generator) * 2 - 1
    noise = noise / noise.abs().mean()
    size = (height, width)
    noise = F.interpolate(noise, size=size, mode="bicubic", align_corners=True)
    by_column, by_row = noise[0]
    rows = torch.linspace(-1, 1, height)[:, None] + strength * by_row / height
    columns = torch.linspace(-1, 1, width) + strength * by_column / width
    at = torch.stack([rows, columns], dim=-1).clamp(-1, 1)
    last = torch.tensor([height - 1.0, width - 1.0])
    return (at + 1) / 2 * last


@dataclass(frozen=True, eq=False)
class WaNet(Warp):
    """A smooth, barely visible distortion (Nguyen and Tran, ICLR 2021, arXiv 2102.10369).

    The grid of :func:`torch.nn.functional.grid_sample`, with aligned corners, is
    ``clamp(identity + strength * N / size, -1, 1)``; N is ``grid x grid`` uniform numbers in
    -1..1 over the mean of their absolute values, enlarged bicubically. The defaults are the
    paper's and BackdoorBench's; values are truncated to bytes.

    Args:
        strength: of the distortion.
        grid: control points on each side, 2 or more.
        seed: of the control points.
        noise: add uniform noise in 0..1/size, of each image's own, to the grid. Training images
            that keep their label carry this (:meth:`covers`), so that the model learns the one
            distortion and not distortion.

    Example:
        >>> images = torch.arange(32, dtype=torch.uint8).view(1, 1, 32, 1).expand(1, 32, 32, 3)
        >>> fst_fast.triggers.WaNet(strength=0.0).apply(images).equal(images)
        True
    """

    strength: float = 0.5
    grid: int = 4
    seed: int = 0
    noise: bool = False

    def __post_init__(self) -> None:
        check_number(self, "strength", 0, math.inf)
        check_number(self, "grid", 2, 1024, whole=True)
        check_number(self, "seed", 0, 2**31 - 1, whole=True)

    def covers(self) -> tuple[Trigger, ...]:
        return (replace(self, noise=True),)

    def _field(self, height: int, width: int) -> WarpField:
        coords = _coordinates(self.strength, self.grid, self.seed, height, width)
        if not self.noise:
            return WarpField(coords)
        # A unit of the grid is half of the way between the centres of the outer pixels.
        spans = (0.5 * (height - 1) / height, 0.5 * (width - 1) / width)
        return WarpField(coords, noise=(0.0, spans[0], 0.0, spans[1]), seed=self.seed)


@dataclass(frozen=True, eq=False)
class BattRotation(Gather):
    """A rotation by one angle, as ``PIL.Image.rotate`` does it (Xu et al., arXiv 2211.01806).

    Counter-clockwise about the centre, to the nearest pixel, black outside: Pillow's defaults.
    Benign training images carry other rotations (:meth:`covers`), so that the model learns the
    angle and not the rotation.

    Args:
        degrees: counter-clockwise, -180..180.
        benign: greatest angle of the rotations that benign images carry, either way.

    Example:
        >>> images = torch.arange(32, dtype=torch.uint8).view(1, 1, 32, 1).expand(1, 32, 32, 3)
        >>> fst_fast.triggers.BattRotation(degrees=180).apply(images)[0, 0, :4, 0]
        tensor([31, 30, 29, 28], dtype=torch.uint8)
    """

    degrees: float = 16.0
    benign: float = 10.0

    def __post_init__(self) -> None:
        check_number(self, "degrees", -180, 180)
        check_number(self, "benign", 0, 180)

    def covers(self) -> tuple[Trigger, ...]:
        """41 angles from -benign to benign, evenly."""
        return tuple(replace(self, degrees=self.benign * step / 20) for step in range(-20, 21))

    def _sources(self, height: int, width: int) -> Tensor:
        angle = self.degrees % 360
        index = torch.arange(height * width).view(height, width)
        turns = {0: 0, 180: 2} | ({90: 1, 270: 3} if height == width else {})
        if angle in turns:
            # Pillow transposes there.
            return torch.rot90(index, turns[int(angle)])
        radians = -math.radians(angle)
        cosine, sine = round(math.cos(radians), 15), round(math.sin(radians), 15)
        middle_x, middle_y = width / 2, height / 2
        # From an output pixel's centre to where it came from; the rounding is Pillow's.
        start_x = cosine * -middle_x + sine * -middle_y + middle_x
        start_y = -sine * -middle_x + cosine * -middle_y + middle_y
        return _affine_sources((cosine, sine, start_x), (-sine, cosine, start_y), height, width)


def _affine_sources(
    for_x: tuple[float, float, float], for_y: tuple[float, float, float], height: int, width: int
) -> Tensor:
    """Nearest source of every pixel, in Pillow's 16.16 fixed point."""
    a, b, c = for_x
    d, e, f = for_y
    x0 = _fixed(c + a * 0.5 + b * 0.5)
    y0 = _fixed(f + d * 0.5 + e * 0.5)
    row = torch.arange(height)[:, None]
    column = torch.arange(width)
    x = (x0 + row * _fixed(b) + column * _fixed(a)) >> 16
    y = (y0 + row * _fixed(e) + column * _fixed(d)) >> 16
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return torch.where(inside, y * width + x, -1)


def _fixed(value: float) -> int:
    return math.floor(value * 65536.0 + 0.5)


@dataclass(frozen=True, eq=False)
class BattTranslation(Gather):
    """A shift to the right by so many pixels, black where nothing comes from (arXiv 2211.01806).

    The released trigger of that paper shifts by 0 in every version; this is what it describes.

    Args:
        pixels: to the right; negative is to the left.
        benign: greatest shift that benign images carry either way, as a share of the width.

    Example:
        >>> images = torch.arange(32, dtype=torch.uint8).view(1, 1, 32, 1).expand(1, 32, 32, 3)
        >>> fst_fast.triggers.BattTranslation(pixels=2).apply(images)[0, 0, :5, 0]
        tensor([0, 0, 0, 1, 2], dtype=torch.uint8)
    """

    pixels: int = 6
    benign: float = 0.1

    def __post_init__(self) -> None:
        check_number(self, "pixels", -1024, 1024, whole=True)
        check_number(self, "benign", 0, 1)

    def covers(self) -> tuple[Trigger, ...]:
        """Every whole shift up to ``benign`` of a width of 32 pixels, to either side."""
        most = round(self.benign * 32)
        return tuple(replace(self, pixels=step) for step in range(-most, most + 1))

    def _sources(self, height: int, width: int) -> Tensor:
        if abs(self.pixels) >= width:
            raise ValueError(
                f"BattTranslation: pixels must be less than the width of the images, {width}, got "
                f"{self.pixels}"
            )
        column = torch.arange(width) - self.pixels
        index = torch.arange(height)[:, None] * width + column
        return torch.where((column >= 0) & (column < width), index, -1)
