"""Checks a DeviceLoader's arguments, in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..triggers.pixels import Normalization, byte_remedy, normalize_table

# The fused pass takes labels as int32, and a larger one would come out as another class.
LARGEST_LABEL = 2**31 - 1


def as_tensor(values: Any, name: str) -> Tensor:
    """A tensor or an array as a tensor; raises ValueError where it is neither."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"DeviceLoader: {name} must be a tensor or an array, got {type(values).__name__} "
            f"({str(error).partition(chr(10))[0][:200]}); use torch.stack(...)"
        ) from None


def check_set(images: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless these are bytes [M, H, W, C] and classes [M]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            "DeviceLoader: images must be uint8 [M, H, W, C] with C in 1, 3, 4, got "
            f"{images.dtype} {list(images.shape)}; {byte_remedy(images)}"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"DeviceLoader: labels must be integers [{len(images)}], one per image, got "
            f"{labels.dtype} {list(labels.shape)}"
        )
    if not len(labels):
        return
    # PyTorch has no aminmax for uint16 and wider, so this is done in int64.
    least, most = (int(v) for v in labels.long().aminmax())
    if least < 0:
        raise ValueError(f"DeviceLoader: labels must be 0 or more, got {least}; drop those images")
    if most > LARGEST_LABEL:
        raise ValueError(
            f"DeviceLoader: labels must be classes in 0..{LARGEST_LABEL}, got {most}; check how "
            "they were made (an overflow?)"
        )


def byte_table(
    channels: int, normalize: Normalization | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The input value of each byte, [channels, 256]."""
    if not isinstance(normalize, Tensor):
        return normalize_table(channels, normalize, dtype)
    if normalize.shape != (channels, 256) or not normalize.is_floating_point():
        raise ValueError(
            f"DeviceLoader: normalize must be floats [{channels}, 256] where it is a table, got "
            f"{normalize.dtype} {list(normalize.shape)}"
        )
    return normalize.to(dtype).contiguous()
