"""Batch norm in training mode, an addition and a ReLU, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_parts import (
    MERGED_CHANNELS,
    MOST_SLICES,
    Blocks,
    activation_input,
    line_of,
    offsets_of,
)

# Values whose mean is near enough that of all.
SOME = tl.constexpr(8)


@triton.jit
def _origin(x_ptr, rows, channel, there, channels, pixels, compute, PLANAR: tl.constexpr):
    """A number near the mean of a channel: a mean far from zero then costs no digits."""
    row = tl.arange(0, SOME).to(tl.int64) * (rows // SOME)
    offsets = offsets_of(row, channel, channels, pixels, PLANAR)
    x = tl.load(x_ptr + offsets, mask=there[None, :], other=0).to(compute)
    return tl.sum(x, 0) / SOME


@triton.jit
def batch_norm_collect_kernel(
    x_ptr,
    partials_ptr,  # [3, slices, C]: means from the origin, squares around them, counts
    rows,
    channels,
    pixels,
    PLANAR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Mean and squares around it of a slice of the rows, tile by tile."""
    compute = partials_ptr.dtype.element_ty
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = channel < channels
    origin = _origin(x_ptr, rows, channel, there, channels, pixels, compute, PLANAR)
    mean = tl.zeros([BLOCK_CHANNELS], compute)
    squares = tl.zeros([BLOCK_CHANNELS], compute)
    count = tl.zeros([], compute)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for start in range(first, rows, tl.num_programs(0).to(tl.int64) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & there[None, :]
        offsets = offsets_of(row, channel, channels, pixels, PLANAR)
        x = tl.load(x_ptr + offsets, mask=mask, other=0).to(compute)
        x = tl.where(mask, x - origin[None, :], 0.0)
        more = tl.minimum(rows - start, BLOCK_ROWS).to(compute)
        center = tl.sum(x, 0) / more
        apart = tl.where(mask, x - center[None, :], 0.0)
        # A sum of many values was rounded; what is left of it is small.
        rest = tl.sum(apart, 0) / more
        center += rest
        # Two samples together (Chan, Golub and LeVeque, 1983).
        share = more / (count + more)
        shift = center - mean
        squares += tl.sum(apart * apart, 0) - rest * rest * more
        squares += shift * shift * share * count
        mean += shift * share
        count += more
    slices = tl.num_programs(0)
    place = partials_ptr + tl.program_id(0) * channels + channel
    tl.store(place, mean, mask=there)
    tl.store(place + slices * channels, squares, mask=there)
    tl.store(place + 2 * slices * channels, tl.zeros_like(mean) + count, mask=there)


@triton.jit
def batch_norm_merge_kernel(
    x_ptr,
    partials_ptr,
    mean_ptr,
    var_ptr,
    slices,
    rows,
    channels,
    pixels,
    PLANAR: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Mean and variance of channels from those of the slices, in float64."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    part = tl.arange(0, BLOCK_SLICES)
    mask = (part < slices)[:, None] & (channel < channels)[None, :]
    place = partials_ptr + part[:, None] * channels + channel[None, :]
    means = tl.load(place, mask=mask, other=0).to(tl.float64)
    squares = tl.load(place + slices * channels, mask=mask, other=0).to(tl.float64)
    counts = tl.load(place + 2 * slices * channels, mask=mask, other=0).to(tl.float64)
    # An absent channel counts as one value.
    count = tl.maximum(tl.sum(counts, 0), 1.0)
    mean = tl.sum(means * counts, 0) / count
    apart = means - mean[None, :]
    var = tl.sum(squares + apart * apart * counts, 0) / count
    there = channel < channels
    origin = _origin(
        x_ptr, rows, channel, there, channels, pixels, mean_ptr.dtype.element_ty, PLANAR
    )
    mean += origin.to(tl.float64)
    tl.store(mean_ptr + channel, mean.to(mean_ptr.dtype.element_ty), mask=there)
    tl.store(var_ptr + channel, var.to(var_ptr.dtype.element_ty), mask=there)


@triton.jit
def batch_norm_apply_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    channels,
    pixels,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = channel < channels
    mean, scale, bias, _ = line_of(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, there, EPS, HAS_WEIGHT, HAS_BIAS
    )
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (row < rows)[:, None] & there[None, :]
    offsets = offsets_of(row, channel, channels, pixels, PLANAR)
    x = tl.load(x_ptr + offsets, mask=mask, other=0).to(mean.dtype)
    value = activation_input(x, residual_ptr, offsets, mask, mean, scale, bias, HAS_RESIDUAL)
    if RELU:
        # NaN stays NaN.
        value = tl.where(value <= 0, 0.0, value)
    tl.store(y_ptr + offsets, value.to(y_ptr.dtype.element_ty), mask=mask)


def batch_norm_act(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    residual: Tensor | None,  # like x
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``fst_fast.ops.batch_norm_act``; returns y, mean [C] and variance [C]."""
    blocks = Blocks(x)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty_like(x)
    mean, var = (x.new_empty(blocks.channels, dtype=compute) for _ in range(2))
    partials = x.new_empty(3, blocks.slices, blocks.channels, dtype=compute)
    sizes = (blocks.rows, blocks.channels, blocks.pixels)
    with torch.cuda.device_of(x):
        batch_norm_collect_kernel[blocks.collecting](x, partials, *sizes, **blocks.options)
        batch_norm_merge_kernel[blocks.merging](
            x,
            partials,
            mean,
            var,
            blocks.slices,
            *sizes,
            PLANAR=blocks.planar,
            BLOCK_SLICES=MOST_SLICES,
            BLOCK_CHANNELS=MERGED_CHANNELS,
        )
        batch_norm_apply_kernel[blocks.applying](
            x,
            # An absent tensor is never read; any pointer stands in for it.
            x if residual is None else residual,
            y,
            mean,
            var,
            mean if weight is None else weight,
            mean if bias is None else bias,
            *sizes,
            # A run-time float would arrive as float32; float64 needs all of it.
            EPS=eps,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            RELU=relu,
            **blocks.options,
        )
    return y, mean, var
