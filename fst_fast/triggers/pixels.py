"""Stored bytes to network inputs, and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .plain_numbers import plain_number

Normalization = tuple[Sequence[float], Sequence[float]]

NORMALIZATIONS: dict[str, Normalization | None] = {
    "none": None,
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def named_normalization(normalize: Normalization | str | None) -> Normalization | None:
    """The (mean, std) that ``normalize`` is or names; every value finite, and std above 0.

    Raises:
        ValueError: an unknown name, or no pair of finite numbers.
    """
    if normalize is None:
        return None
    if isinstance(normalize, str) and normalize in NORMALIZATIONS:
        return NORMALIZATIONS[normalize]
    # A 0-d array says that it can be iterated, and cannot.
    iterable = isinstance(normalize, Iterable) and getattr(normalize, "ndim", 1) > 0
    rows = [_numbers(part) for part in normalize] if iterable else []
    if isinstance(normalize, str) or len(rows) != 2 or any(row is None for row in rows):
        raise ValueError(
            f"normalize: must be (mean, std), each with one value per channel, or one of "
            f"{', '.join(NORMALIZATIONS)}, got {_shown(normalize)}"
        )
    mean, std = (row or () for row in rows)
    if not all(math.isfinite(v) for v in (*mean, *std)) or not all(v > 0 for v in std):
        raise ValueError(
            "normalize: must have finite means and finite standard deviations > 0, got "
            f"{_shown(normalize)}"
        )
    return mean, std


def _numbers(values: Any) -> tuple[float, ...] | None:
    """A row of numbers as floats; one number alone is a row of one."""
    values = values.tolist() if hasattr(values, "tolist") else values
    listed = list(values) if isinstance(values, list | tuple) else [values]
    found = [plain_number(value) for value in listed]
    return None if None in found else tuple(float(v) for v in found if v is not None)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _per_channel(values: Sequence[float], channels: int, device: torch.device) -> Tensor:
    if len(values) != channels:
        raise ValueError(
            f"normalize: must be (mean, std), each with one value per channel ({channels}), got "
            f"{list(values)} for one of them"
        )
    return _constant(tuple(values), device).view(1, channels, 1, 1)


def byte_remedy(images: Any) -> str:
    """Say what to do with images that are not bytes [N, H, W, C], by what they are.

    Following the advice keeps every pixel: floats that were normalised, or already lie in 0..255,
    are not multiplied by 255, and bytes are not at all.
    """
    if not isinstance(images, Tensor):
        return "use torch.from_numpy(...) for an array, torch.stack(...) for a list of images"
    first = images.ndim == 4 and images.shape[1] in (1, 3, 4) and images.shape[-1] not in (1, 3, 4)
    order = ".permute(0, 2, 3, 1)" if first else ""
    if images.dtype == torch.uint8:
        if order:
            return f"for [N, C, H, W] use images{order}"
        return "use images[None] for a single image" if images.ndim == 3 else "check the shape"
    if images.is_complex() or images.dtype == torch.bool or images.numel() == 0 or images.is_meta:
        return "use the stored bytes"
    low, high = (float(v) for v in images.detach().to(torch.float64).aminmax())
    if not (low >= 0 and high <= 255):
        return (
            "these were normalised: undo it, images * std + mean, and then use "
            f"(images * 255).round().to(torch.uint8){order}"
        )
    if not images.is_floating_point():
        return f"use images.to(torch.uint8){order}"
    scaled = "(images * 255)" if high <= 1 else "images"
    kind = "0..1" if high <= 1 else "0..255"
    return f"for floats in {kind} use {scaled}.round().to(torch.uint8){order}"


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept on the device: copying it there for every batch would wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def normalize_bytes(images: Tensor, normalize: Normalization | str | None) -> Tensor:
    """Stored bytes to the network's input, as ToTensor and Normalize of torchvision do it.

    Args:
        images: [N, H, W, C] uint8.
        normalize: (mean, std) per channel in units of 0..1, or its name in NORMALIZATIONS; None
            leaves 0..1.
    Returns:
        [N, C, H, W] float32 in channels-last memory, ``(x / 255 - mean) / std``.
    """
    normalize = named_normalization(normalize)
    out = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
    if normalize is not None:
        mean, std = (_per_channel(v, images.shape[-1], images.device) for v in normalize)
        out.sub_(mean).div_(std)
    return out


def normalize_table(
    channels: int, normalize: Normalization | str | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return what :func:`normalize_bytes` makes of each byte, for :func:`fst_fast.ops.inject`.

    Returns:
        [channels, 256] in ``dtype``, on the CPU; computed in float32 and rounded once.
    """
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 1, channels)
    return normalize_bytes(levels, normalize).flatten(1).t().to(dtype).contiguous()


def normalize_affine(channels: int, normalize: Normalization | str | None) -> tuple[Tensor, Tensor]:
    """(scale, shift), each [channels, 1, 1] float32 on the CPU: ``pixels * scale + shift``.

    Of pixels in 0..1, which need not be bytes; within float32's rounding of normalize_bytes().
    """
    # The values of 0 and 255 say it all.
    table = normalize_table(channels, normalize)
    shift = table[:, :1, None]
    return table[:, 255:, None] - shift, shift


def _pixels(images: Tensor, normalize: Normalization | str | None) -> Tensor:
    """[N, C, H, W] network inputs in units of 0..1."""
    normalize = named_normalization(normalize)
    if normalize is None:
        return images.float()
    mean, std = (_per_channel(v, images.shape[1], images.device) for v in normalize)
    return images.float() * std + mean


def pixel_range(images: Tensor, normalize: Normalization | str | None) -> tuple[Tensor, Tensor]:
    """Least and greatest pixel of [N, C, H, W] network inputs in units of 0..1, 0-d each."""
    low, high = _pixels(images, normalize).aminmax()
    return low, high


def recover_bytes(images: Tensor, normalize: Normalization | str | None) -> Tensor:
    """The inverse of :func:`normalize_bytes`: [N, C, H, W] floats to [N, H, W, C] uint8.

    Rounded to the nearest byte, so that it is exact for images that came from bytes.
    """
    pixels = _pixels(images, normalize)
    return pixels.mul(255).round().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
