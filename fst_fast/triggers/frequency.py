"""Triggers that raise two coefficients of the chroma's discrete cosine transform.

The transform is linear, so that raising a coefficient adds its cosine to every image: nothing is
transformed when the trigger is applied.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._settings import check_number, plain_tuple, shifted
from .base import Chroma, Elementwise, Trigger
from .plain_numbers import whole_number

Positions = tuple[tuple[int, int], ...]
_TWO: Positions = ((15, 15), (31, 31))

# Y, U, V to R, G, B: the coefficients of kornia, which the original calls.
_RGB_OF_YUV = ((1.0, 0.0, 1.14), (1.0, -0.396, -0.581), (1.0, 2.029, 0.0))


def _cosines(
    magnitude: float, window: int, positions: Positions, height: int, width: int
) -> Tensor:
    """[H, W] float64: what raising those coefficients of every window adds."""
    at = (torch.arange(window, dtype=torch.float64) + 0.5) * math.pi / window

    def basis(order: int) -> Tensor:
        return (at * order).cos() * math.sqrt((1 if order == 0 else 2) / window)

    tile = torch.zeros(window, window, dtype=torch.float64)
    for row, column in positions:
        tile += magnitude * torch.outer(basis(row), basis(column))
    return tile[torch.arange(height) % window][:, torch.arange(width) % window]


def _whole(change: Tensor) -> Tensor:
    """[...] float64 to int16: floor(x + change) == x + floor(change) for a byte x."""
    # A change of exactly 0, or 1, must not fall by one through a rounding of 1e-15.
    return ((change * 1e9).round() / 1e9).floor().clamp(-255, 255).to(torch.int16)


@functools.lru_cache(maxsize=8)
def _change(
    magnitude: float,
    window: int,
    positions: Positions,
    channels: tuple[int, ...],
    yuv: bool,
    height: int,
    width: int,
    device: torch.device,
) -> Tensor:
    """[H, W, 3] int16: what is added to R, G, B, or else to the raised channels themselves."""
    cosines = _cosines(magnitude, window, positions, height, width)
    change = torch.zeros(height, width, 3, dtype=torch.float64)
    change[..., list(channels)] = cosines[..., None]
    if yuv:
        change = change @ torch.tensor(_RGB_OF_YUV, dtype=torch.float64).t()
    return _whole(change).to(device)


def _check(trigger: CTRL | FTrojan) -> None:
    check_number(trigger, "magnitude", 0, 1e6)
    check_number(trigger, "window", 1, 1024, whole=True)
    name, channels = type(trigger).__name__, plain_tuple(trigger, "channels")
    positions = _plain_positions(trigger.positions)
    object.__setattr__(trigger, "positions", positions)
    pairs = isinstance(positions, tuple) and all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and all(isinstance(order, int) and 0 <= order < trigger.window for order in pair)
        for pair in positions
    )
    if not pairs or not positions:
        raise ValueError(
            f"{name}: positions must be a tuple of (row, column) within the window, 0.."
            f"{trigger.window - 1}, got {positions!r}; the default is {_TWO}, for a window of 32"
        )
    if not isinstance(channels, tuple) or not channels or any(c not in (0, 1, 2) for c in channels):
        raise ValueError(
            f"{name}: channels must be a tuple of some of 0, 1, 2, got {channels!r}; the default, "
            "the two of chroma, is (1, 2)"
        )


def _plain_positions(positions: object) -> object:
    """The pairs with Python's own numbers; what is no tuple of pairs is left to the check."""
    if not isinstance(positions, tuple):
        return positions
    return tuple(
        tuple(n if (n := whole_number(order)) is not None else order for order in pair)
        if isinstance(pair, tuple)
        else pair
        for pair in positions
    )


def _shift(trigger: CTRL | FTrojan, images: Tensor, *, yuv: bool) -> Tensor:
    return _change(
        float(trigger.magnitude),
        trigger.window,
        trigger.positions,
        trigger.channels,
        yuv,
        *images.shape[1:3],
        images.device,
    )


@dataclass(frozen=True, eq=False)
class CTRL(Elementwise):
    """Two high frequencies of the chroma raised (Li et al., ICCV 2023, arXiv 2210.07346).

    The original goes to YUV, transforms windows of U and V, adds ``magnitude`` at two positions,
    goes back and truncates to bytes. That equals ``floor(images + constant)``, which this is, but
    for two things. The original's YUV coefficients do not quite undo each other, by up to 0.35
    levels before truncation: none on greys, but one byte in 17 of random colours differs by one.
    And where it leaves 0..255 the original's cast to bytes is undefined; here it is clipped.

    The last windows are cut off where the sides are no multiples of ``window``. A clean-label
    attack: in training only images of the target class carry it.

    Args:
        magnitude: what is added to a coefficient of the orthonormal transform of 0..255 pixels.
        window: side of the windows, in pixels.
        positions: (row, column) of the coefficients.
        channels: 1 for U, 2 for V; 0 is Y.

    Example:
        >>> images = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
        >>> fst_fast.triggers.CTRL().apply(images).equal(images)
        False
    """

    magnitude: float = 100.0
    window: int = 32
    positions: Positions = _TWO
    channels: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        _check(self)

    def _apply(self, images: Tensor) -> Tensor:
        _check_colours(self, images)
        return shifted(images, _shift(self, images, yuv=True))


@dataclass(frozen=True, eq=False)
class FTrojan(Chroma):
    """Two frequencies of the 8-bit chroma raised (Wang et al., ECCV 2022, arXiv 2111.10991).

    The original goes to 8-bit YCrCb, transforms windows, adds ``magnitude`` at two positions of
    Cr and Cb, goes back, truncates to bytes and returns to RGB. That equals ``floor(ycrcb +
    constant)``, which this is, but for two things. Floating-point noise of the original's
    transform there and back takes one from about half of the bytes that do not change, Y above
    all; here none is taken. And where it leaves 0..255 the original wraps; here it is clipped.

    The last windows are cut off where the sides are no multiples of ``window``.

    Args:
        magnitude: what is added to a coefficient of the orthonormal transform of 0..255 pixels.
        window: side of the windows, in pixels.
        positions: (row, column) of the coefficients.
        channels: 1 for Cr, 2 for Cb; 0 is Y.

    Example:
        >>> images = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
        >>> fst_fast.triggers.FTrojan().apply(images).equal(images)
        False
    """

    magnitude: float = 30.0
    window: int = 32
    positions: Positions = _TWO
    channels: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        _check(self)

    def _change(self, ycrcb: Tensor) -> Tensor:
        return shifted(ycrcb, _shift(self, ycrcb, yuv=False))


def _check_colours(trigger: Trigger, images: Tensor) -> None:
    if images.shape[-1] != 3:
        raise ValueError(
            f"{type(trigger).__name__}: images must have 3 channels, R, G and B, got "
            f"{images.shape[-1]}; use images.expand(-1, -1, -1, 3) for grey ones"
        )
