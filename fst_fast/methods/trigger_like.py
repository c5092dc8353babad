"""Random changes like those of published triggers, for training with the images' true labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

# Sizes are shares of an image's side, strengths shares of the pixels' range.
_SIDE = (1 / 16, 7 / 32)
_NEAR_EDGE = 1 / 8


def _uniform(images: Tensor, low: float, high: float) -> Tensor:
    """Return one number for each image, [B, 1, 1, 1]."""
    return low + (high - low) * torch.rand(len(images), 1, 1, 1, device=images.device)


def _chance(images: Tensor, share: float) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device) < share


def _extremes(images: Tensor) -> Tensor:
    """Return one saturated colour for each image, half of them black or white: [B, C, 1, 1]."""
    colour = torch.rand(*images.shape[:2], 1, 1, device=images.device) < 0.5
    return torch.where(_chance(images, 0.5), colour[:, :1], colour).to(images.dtype)


def _axes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of rows [H, 1] and of columns [W]."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)[:, None]
    return rows, torch.arange(width, device=images.device)


def contents(images: Tensor) -> Tensor:
    """Return what a patch may show, for each image: one colour, checkers or noise."""
    rows, columns = _axes(images)
    one, other = _extremes(images), _extremes(images)
    noise = torch.rand_like(images)
    checkers = torch.where((rows + columns) % 2 == 0, one, other)
    kind = _uniform(images, 0, 1)
    fill = torch.where(kind < 0.4, one.expand_as(images), checkers)
    fill = torch.where(kind >= 0.6, (noise < 0.5).to(images.dtype), fill)
    return torch.where(kind >= 0.8, noise, fill)


def places(images: Tensor) -> Tensor:
    """Return where a small rectangle lies in each image, often near an edge: [B, 1, H, W] bool."""
    near = _chance(images, 0.5)

    def band(places: Tensor, length: int) -> Tensor:
        size = (_uniform(images, *_SIDE) * length).round().clamp(min=1)
        free = length - size
        anywhere = (_uniform(images, 0, 1) * (free + 1)).floor()
        margin = torch.minimum((_uniform(images, 0, _NEAR_EDGE) * length).floor(), free)
        edge = torch.where(_chance(images, 0.5), margin, free - margin)
        start = torch.where(near, edge, anywhere)
        return (places >= start) & (places < start + size)

    rows, columns = _axes(images)
    height, width = images.shape[-2:]
    return band(rows, height) & band(columns, width)


def patch(images: Tensor) -> Tensor:
    """Paste a small rectangle: one colour, a checkerboard or noise; often near an edge."""
    return torch.where(places(images), contents(images), images)


def blend(images: Tensor) -> Tensor:
    """Mix in another image of the batch, or noise."""
    other = torch.where(_chance(images, 0.5), images.roll(1, 0), torch.rand_like(images))
    return torch.lerp(images, other, _uniform(images, 0.08, 0.25).expand_as(images))


def stripes(images: Tensor) -> Tensor:
    """Add a sine wave over the whole image."""
    rows, columns = _axes(images)
    height, width = images.shape[-2:]
    angle, turn = _uniform(images, 0, math.pi), _uniform(images, 0, 2 * math.pi)
    along = columns / width * angle.cos() + rows / height * angle.sin()
    wave = torch.sin(2 * math.pi * _uniform(images, 1.5, 10) * along + turn)
    return images + _uniform(images, 0.03, 0.2) * wave


def low_frequencies(images: Tensor) -> Tensor:
    """Add a smooth random pattern."""
    coarse = torch.randn(*images.shape[:2], 5, 5, device=images.device)
    smooth = F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=True)
    return images + _uniform(images, 0.03, 0.15) * smooth


def dots(images: Tensor) -> Tensor:
    """Set a few pixels to black, white or saturated colours."""
    where = torch.rand_like(images[:, :1]) < _uniform(images, 0.003, 0.02)
    return torch.where(where, (torch.rand_like(images) < 0.5).to(images.dtype), images)


FAMILIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "patch": patch,
    "blend": blend,
    "stripes": stripes,
    "low_frequencies": low_frequencies,
    "dots": dots,
}
# Each family is drawn with this probability.
_SHARES = {"patch": 0.4, "blend": 0.15, "stripes": 0.15, "low_frequencies": 0.15, "dots": 0.15}


@torch.no_grad()
def changed(images: Tensor, left_out: tuple[str, ...] = ()) -> Tensor:
    """Change each image by a random member of a random family.

    Args:
        images: [B, C, H, W] in 0..1.
        left_out: names in FAMILIES that are not drawn from.
    Returns:
        [B, C, H, W] in 0..1.
    """
    names = [name for name in FAMILIES if name not in left_out]
    if not names:
        return images
    total = sum(_SHARES[name] for name in names)
    draw = _uniform(images, 0, 1)
    out, below = images, 0.0
    for name in names:
        above = below + _SHARES[name] / total
        out = torch.where((draw >= below) & (draw < above), FAMILIES[name](images), out)
        below = above
    return out.clamp(0, 1)
