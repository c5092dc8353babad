"""Checks the arguments of inject."""

from __future__ import annotations

import torch
from torch import Tensor

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_SIDE = 1024
TABLES = tuple(
    f"triggers.{name}"
    for name in ("table", "noise", "patterns", "maps", "sources", "coords", "lookup")
)


def check(
    images: Tensor,
    params: Tensor,
    lut: Tensor,
    tables: tuple[Tensor, ...] | None,
    height: int,
    width: int,
) -> None:
    """Shapes, dtypes, devices and layouts; costs no look at a value."""
    if images.dtype != torch.uint8:
        raise ValueError(
            f"inject: images must be uint8 [M, H, W, C], got {images.dtype}; for floats in 0..1 "
            "use (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)"
        )
    if images.dim() != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"inject: images must be [M, H, W, C] with C in 1, 3, 4, got {list(images.shape)}; "
            "for [M, C, H, W] use images.permute(0, 2, 3, 1).contiguous()"
        )
    sides = (*images.shape[1:3], height, width)
    if not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise ValueError(
            f"inject: images and size must have sides in 1..{LARGEST_SIDE}, got images "
            f"{list(images.shape)} and size ({height}, {width}); resize the images first"
        )
    if params.dtype != torch.int32 or params.dim() != 2 or params.shape[1] != 8:
        raise ValueError(
            f"inject: params must be int32 [B, 8], got {params.dtype} {list(params.shape)}"
        )
    if lut.dtype not in OUT_DTYPES or lut.shape != (images.shape[-1], 256):
        raise ValueError(
            f"inject: lut must be float32, bfloat16 or float16 [{images.shape[-1]}, 256], got "
            f"{lut.dtype} {list(lut.shape)}; use fst_fast.triggers.pixels.normalize_table"
        )
    named = [("images", images), ("params", params), ("lut", lut)]
    if tables is not None:
        _check_tables(images, tables)
        named += zip(TABLES, tables, strict=True)
    device = images.device
    for name, tensor in named:
        if tensor.device != device:
            raise ValueError(
                f"inject: {name} must be on {images.device} like images, got {tensor.device}; "
                f"use {name}.to({str(images.device)!r})"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"inject: {name} must be contiguous, got strides {list(tensor.stride())}; "
                f"use {name}.contiguous()"
            )


def _check_tables(images: Tensor, tables: tuple[Tensor, ...]) -> None:
    _, height, width, channels = images.shape
    count = len(tables[0])
    wanted = (
        (torch.int32, (count, 8)),
        (torch.float32, (count, 4)),
        (torch.int16, (-1, height, width, channels)),
        (torch.uint8, (-1, 256)),
        (torch.int32, (-1, height, width)),
        (torch.float32, (-1, height, width, 2)),
        (torch.uint8, (-1, height, width, channels)),
    )
    for name, tensor, (dtype, shape) in zip(TABLES, tables, wanted, strict=True):
        got = tuple(tensor.shape)
        if tensor.dtype != dtype or got[1:] != shape[1:] or shape[0] not in (-1, *got[:1]):
            text = ", ".join("N" if n < 0 else str(n) for n in shape)
            raise ValueError(
                f"inject: {name} must be {dtype} [{text}] for images of {height} x {width} x "
                f"{channels}, got {tensor.dtype} {list(got)}; lower the triggers for images of "
                "this size"
            )


def check_rows(params: Tensor, images: Tensor, table: Tensor, lookup: Tensor) -> None:
    """Every source, trigger and looked-up row is there. Reads values, so for the CPU alone."""
    if len(params) == 0:
        return
    source, trigger, key = params[:, 0], params[:, 4], params[:, 7]
    _within("source", source, 0, len(images), "images")
    _within("trigger", trigger, -1, len(table), "triggers.table")
    if len(table):
        looks = (trigger >= 0) & (table[trigger.clamp(min=0).long(), 0] & 1 > 0)
        _within("key", key[looks], 0, len(lookup), "triggers.lookup")


def _within(name: str, values: Tensor, least: int, end: int, of: str) -> None:
    wrong = torch.nonzero((values < least) | (values >= end)).flatten()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"inject: params must have a {name} in {least}..{end - 1}, a row of {of}, got "
            f"{int(values[first])} (number {first} of those)"
        )
