"""Triggers of the form y = Q(A * x + B): a per-pixel scale and offset, then rounding to bytes."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._settings import check_number, check_pattern, check_seed, plain_tuple
from .base import Elementwise
from .plain_numbers import whole_number

_CORNERS = ("bottom-right", "bottom-left", "top-right", "top-left")


@dataclass(frozen=True, eq=False)
class BadNets(Elementwise):
    """A small solid square in one corner (Gu et al. 2017, arXiv 1708.06733).

    The defaults, 3 x 3 white pixels touching the bottom-right corner, are those of BackdoorBench.

    Args:
        size: side of the square, in pixels.
        value: 0..255, one for all channels or one for each.
        corner: "bottom-right", "bottom-left", "top-right" or "top-left".
        margin: pixels between the square and the border.

    Example:
        >>> images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
        >>> fst_fast.triggers.BadNets(size=2).apply(images)[0, :, :, 0].nonzero().tolist()
        [[30, 30], [30, 31], [31, 30], [31, 31]]
    """

    size: int = 3
    value: int | tuple[int, ...] = 255
    corner: str = "bottom-right"
    margin: int = 0

    def __post_init__(self) -> None:
        check_number(self, "size", 1, math.inf, whole=True)
        check_number(self, "margin", 0, math.inf, whole=True)
        if not isinstance(self.corner, str) or self.corner not in _CORNERS:
            raise ValueError(f"BadNets: corner must be one of {_CORNERS}, got {self.corner!r}")
        values = plain_tuple(self, "value")
        if not isinstance(values, tuple):
            values = (whole_number(values),)
            object.__setattr__(self, "value", self.value if values[0] is None else values[0])
        if not all(isinstance(value, int) and 0 <= value <= 255 for value in values):
            raise ValueError(
                "BadNets: value must be an integer in 0..255, or a tuple with one per channel, got "
                f"{self.value!r}"
            )

    def _apply(self, images: Tensor) -> Tensor:
        _, height, width, channels = images.shape
        reach = self.size + self.margin
        if reach > min(height, width):
            raise ValueError(
                f"BadNets: size + margin must fit into {height} x {width} pixels, got {reach}; "
                "use a smaller size or margin"
            )
        if isinstance(self.value, tuple) and len(self.value) != channels:
            raise ValueError(
                f"BadNets: value must have one entry per channel ({channels}), got {self.value}"
            )
        top = self.margin if self.corner.startswith("top") else height - reach
        left = self.margin if self.corner.endswith("left") else width - reach
        values = self.value if isinstance(self.value, tuple) else (self.value,) * channels
        out = images.clone()
        square = out[:, top : top + self.size, left : left + self.size]
        for channel, value in enumerate(values):
            square[..., channel] = value
        return out


@functools.lru_cache(maxsize=8)
def _noise(seed: int, shape: torch.Size, device: torch.device) -> Tensor:
    """The same bytes on every device, and kept there."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


@dataclass(frozen=True, eq=False)
class Blended(Elementwise):
    """A faint picture over the whole image (Chen et al. 2017, arXiv 1712.05526).

    Equals ``floor((1 - alpha) * images + alpha * pattern)`` in float64, truncated as
    BackdoorBench does.

    Args:
        alpha: opacity of the pattern, 0..1.
        pattern: [H, W, C] uint8 of the images' size. None draws uniform noise from ``seed``, the
            random pattern of the paper's section 4.
        seed: seed of the drawn pattern.

    Example:
        >>> images = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
        >>> fst_fast.triggers.Blended(alpha=0.0).apply(images).unique()
        tensor([100], dtype=torch.uint8)
    """

    alpha: float = 0.2
    pattern: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0, 1)
        check_seed(self)
        if self.pattern is not None:
            check_pattern(self, "pattern", (torch.uint8,))

    def pattern_for(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The pattern [H, W, C] uint8 for images of this [H, W, C] shape."""
        if self.pattern is None:
            return _noise(self.seed, shape, device)
        if self.pattern.shape != shape:
            raise ValueError(
                f"Blended: pattern must be {list(shape)} like one image, got "
                f"{list(self.pattern.shape)}; resize it first"
            )
        return self.pattern.to(device)

    def _apply(self, images: Tensor) -> Tensor:
        pattern = self.pattern_for(images.shape[1:], images.device)
        mixed = images.double() * (1 - self.alpha) + pattern.double() * self.alpha
        return mixed.to(torch.uint8)
