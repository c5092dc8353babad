"""Stored bytes to network inputs, and back."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Normalization = tuple[Sequence[float], Sequence[float]]


def _per_channel(values: Sequence[float], channels: int, device: torch.device) -> Tensor:
    row = tuple(float(v) for v in values) if isinstance(values, Iterable) else ()
    if len(row) != channels:
        raise ValueError(
            f"normalize: must be (mean, std), each with one value per channel ({channels}), got "
            f"{values} for one of them"
        )
    return _constant(row, device).view(1, channels, 1, 1)


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept on the device: copying it there for every batch would wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def normalize_bytes(images: Tensor, normalize: Normalization | None) -> Tensor:
    """Stored bytes to the network's input, as ToTensor and Normalize of torchvision do it.

    Args:
        images: [N, H, W, C] uint8.
        normalize: (mean, std) per channel in units of 0..1; None leaves 0..1.
    Returns:
        [N, C, H, W] float32 in channels-last memory, ``(x / 255 - mean) / std``.
    """
    out = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
    if normalize is not None:
        mean, std = (_per_channel(v, images.shape[-1], images.device) for v in normalize)
        out.sub_(mean).div_(std)
    return out


def normalize_table(
    channels: int, normalize: Normalization | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What :func:`normalize_bytes` makes of each byte, for :func:`fst_fast.ops.inject`.

    Returns:
        [channels, 256] in ``dtype``, on the CPU; computed in float32 and rounded once.
    """
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 1, channels)
    return normalize_bytes(levels, normalize).flatten(1).t().to(dtype).contiguous()


def normalize_affine(channels: int, normalize: Normalization | None) -> tuple[Tensor, Tensor]:
    """(scale, shift), each [channels, 1, 1] float32 on the CPU: ``pixels * scale + shift``.

    Of pixels in 0..1, which need not be bytes; within float32's rounding of normalize_bytes().
    """
    # What 0 and 255 become says it all.
    table = normalize_table(channels, normalize)
    shift = table[:, :1, None]
    return table[:, 255:, None] - shift, shift


def _pixels(images: Tensor, normalize: Normalization | None) -> Tensor:
    """[N, C, H, W] network inputs in units of 0..1."""
    if normalize is None:
        return images.float()
    mean, std = (_per_channel(v, images.shape[1], images.device) for v in normalize)
    return images.float() * std + mean


def pixel_range(images: Tensor, normalize: Normalization | None) -> tuple[Tensor, Tensor]:
    """Least and greatest pixel of [N, C, H, W] network inputs in units of 0..1, 0-d each."""
    low, high = _pixels(images, normalize).aminmax()
    return low, high


def recover_bytes(images: Tensor, normalize: Normalization | None) -> Tensor:
    """The inverse of :func:`normalize_bytes`: [N, C, H, W] floats to [N, H, W, C] uint8.

    Rounded to the nearest byte, so that it is exact for images that came from bytes.
    """
    pixels = _pixels(images, normalize)
    return pixels.mul(255).round().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
