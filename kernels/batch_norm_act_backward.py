"""The gradients of batch_norm_act, in Triton."""

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


@triton.jit
def batch_norm_collect_gradients_kernel(
    d_y_ptr,
    x_ptr,
    residual_ptr,
    d_residual_ptr,
    partials_ptr,  # [2, slices, C]: sums of g and of g * (x - mean)
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
    PASSES_ON: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """PASSES_ON: what the ReLU lets pass is the gradient of the residual."""
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = channel < channels
    mean, scale, bias, _ = line_of(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, there, EPS, HAS_WEIGHT, HAS_BIAS
    )
    total = tl.zeros_like(mean)
    product = tl.zeros_like(mean)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for start in range(first, rows, tl.num_programs(0).to(tl.int64) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & there[None, :]
        offsets = offsets_of(row, channel, channels, pixels, PLANAR)
        x = tl.load(x_ptr + offsets, mask=mask, other=0).to(mean.dtype)
        gradient = tl.load(d_y_ptr + offsets, mask=mask, other=0).to(mean.dtype)
        if RELU:
            given = activation_input(
                x, residual_ptr, offsets, mask, mean, scale, bias, HAS_RESIDUAL
            )
            gradient = tl.where(given <= 0, 0.0, gradient)
        if PASSES_ON:
            passed = gradient.to(d_residual_ptr.dtype.element_ty)
            tl.store(d_residual_ptr + offsets, passed, mask=mask)
        total += tl.sum(gradient, 0)
        # Rows past the end have no gradient, and no value either.
        product += tl.sum(tl.where(mask, gradient * (x - mean[None, :]), 0.0), 0)
    place = partials_ptr + tl.program_id(0) * channels + channel
    tl.store(place, total, mask=there)
    tl.store(place + tl.num_programs(0) * channels, product, mask=there)


@triton.jit
def batch_norm_merge_gradients_kernel(
    partials_ptr,
    var_ptr,
    d_weight_ptr,
    d_bias_ptr,
    means_ptr,  # [2, C]: of g, and the slope of g over x - mean
    slices,
    channels,
    count,
    EPS: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = channel < channels
    part = tl.arange(0, BLOCK_SLICES)
    mask = (part < slices)[:, None] & there[None, :]
    place = partials_ptr + part[:, None] * channels + channel[None, :]
    total = tl.sum(tl.load(place, mask=mask, other=0).to(tl.float64), 0)
    product = tl.load(place + slices * channels, mask=mask, other=0).to(tl.float64)
    product = tl.sum(product, 0)
    var = tl.load(var_ptr + channel, mask=there, other=1)
    rstd = (1 / tl.sqrt(var + EPS)).to(tl.float64)
    compute = means_ptr.dtype.element_ty
    count = count.to(tl.float64)
    tl.store(d_bias_ptr + channel, total.to(compute), mask=there)
    tl.store(d_weight_ptr + channel, (product * rstd).to(compute), mask=there)
    tl.store(means_ptr + channel, (total / count).to(compute), mask=there)
    slope = product * rstd * rstd / count
    tl.store(means_ptr + channels + channel, slope.to(compute), mask=there)


@triton.jit
def batch_norm_apply_gradients_kernel(
    d_y_ptr,
    x_ptr,
    residual_ptr,
    d_x_ptr,
    means_ptr,
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
    center = tl.load(means_ptr + channel, mask=there, other=0)
    slope = tl.load(means_ptr + channels + channel, mask=there, other=0)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (row < rows)[:, None] & there[None, :]
    offsets = offsets_of(row, channel, channels, pixels, PLANAR)
    x = tl.load(x_ptr + offsets, mask=mask, other=0).to(mean.dtype)
    gradient = tl.load(d_y_ptr + offsets, mask=mask, other=0).to(mean.dtype)
    if RELU:
        given = activation_input(x, residual_ptr, offsets, mask, mean, scale, bias, HAS_RESIDUAL)
        gradient = tl.where(given <= 0, 0.0, gradient)
    d_x = gradient - center[None, :] - (x - mean[None, :]) * slope[None, :]
    d_x = (d_x * scale[None, :]).to(d_x_ptr.dtype.element_ty)
    tl.store(d_x_ptr + offsets, d_x, mask=mask)


def batch_norm_act_backward(
    d_y: Tensor,  # like x
    x: Tensor,  # [N, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    residual: Tensor | None,  # like x
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    relu: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``fst_fast.ops.reference.batch_norm_act_backward``."""
    blocks = Blocks(x)
    wants_x, wants_weight, wants_residual = output_mask
    d_x, d_residual = (torch.empty_like(x) if w else x.new_empty(0) for w in output_mask[::2])
    d_weight, d_bias = torch.empty_like(mean), torch.empty_like(mean)
    partials = mean.new_empty(2, blocks.slices, blocks.channels)
    means = mean.new_empty(2, blocks.channels)
    sizes = (blocks.rows, blocks.channels, blocks.pixels)
    added = x if residual is None else residual
    line = (mean, var, mean if weight is None else weight, mean if bias is None else bias)
    flags = {"EPS": eps, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    flags |= {"HAS_RESIDUAL": residual is not None, **blocks.options}
    with torch.cuda.device_of(x):
        batch_norm_collect_gradients_kernel[blocks.collecting](
            d_y,
            x,
            added,
            d_residual,
            partials,
            *line,
            *sizes,
            RELU=relu,
            PASSES_ON=wants_residual,
            **flags,
        )
        batch_norm_merge_gradients_kernel[blocks.merging](
            partials,
            var,
            d_weight,
            d_bias,
            means,
            blocks.slices,
            blocks.channels,
            blocks.rows,
            EPS=eps,
            BLOCK_SLICES=MOST_SLICES,
            BLOCK_CHANNELS=MERGED_CHANNELS,
        )
        if wants_x:
            # What the ReLU has let pass is in d_residual.
            batch_norm_apply_gradients_kernel[blocks.applying](
                d_residual if wants_residual else d_y,
                x,
                added,
                d_x,
                means,
                *line,
                *sizes,
                RELU=relu and not wants_residual,
                **flags,
            )
    if not wants_weight:
        d_weight, d_bias = mean.new_empty(0), mean.new_empty(0)
    return d_x, d_weight, d_bias, d_residual
