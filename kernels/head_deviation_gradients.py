"""The kernels of ``head_deviation_loss`` for many classes that end the work on its products."""

import triton
import triton.language as tl

from .head_deviation_parts import (
    deviation_strength,
    finish_losses,
    scalar_or_one,
    sum_vector,
)


@triton.jit
def head_deviation_weight_kernel(
    products_ptr,  # the sum over rows; may be d_weight itself
    weight_ptr,
    weight0_ptr,
    weight0_count,
    d_weight_ptr,
    d_weight_count,
    overlaps_ptr,
    totals_ptr,
    BLOCK: tl.constexpr,
):
    """d_weight = factor * products + share * W0, rounded once; this program's part of <W, W0>."""
    dtype: tl.constexpr = totals_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0 = tl.load(weight0_ptr + i, mask=i < weight0_count, other=0).to(dtype)
    w = tl.load(weight_ptr + i, mask=i < weight0_count, other=0)
    tl.store(overlaps_ptr + tl.program_id(0), tl.sum(w.to(tl.float64) * w0.to(tl.float64)))
    d_w = tl.load(products_ptr + i, mask=i < d_weight_count, other=0) * tl.load(totals_ptr + 2)
    # Not a product with 0: the share may be infinite where there is no W0.
    d_w += tl.where(i < weight0_count, tl.load(totals_ptr + 1) * w0, 0)
    tl.store(d_weight_ptr + i, d_w, mask=i < d_weight_count)


@triton.jit
def head_deviation_finish_kernel(
    losses_ptr,
    hits_ptr,
    totals_ptr,
    overlaps_ptr,
    overlaps_count,
    alpha: tl.float64,
    alpha_scale_ptr,
    alpha_scale_count,
    weight_scale_ptr,
    weight_scale_count,
    loss_ptr,
    cross_entropy_ptr,
    penalty_ptr,
    correct_ptr,
    invalid_ptr,
    d_logits_ptr,  # [tile_rows, classes]
    d_logits_stride,
    tile_rows,
    first_row,
    sums_ptr,  # [classes], of d_logits of earlier tiles
    d_bias_ptr,
    rows,
    classes,
    BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """After the last tile, program 0 finishes the losses; the others add some classes' d_bias."""
    dtype: tl.constexpr = losses_ptr.dtype.element_ty
    last = first_row + tile_rows == rows
    if tl.program_id(0) == 0:
        if last:
            strength = deviation_strength(alpha, alpha_scale_ptr, alpha_scale_count)
            overlap = sum_vector(overlaps_ptr, overlaps_count, tl.float64, BLOCK)
            overlap *= scalar_or_one(weight_scale_ptr, weight_scale_count, tl.float64)
            finish_losses(
                losses_ptr, hits_ptr, rows, tl.load(totals_ptr), tl.load(invalid_ptr),
                (strength * overlap).to(dtype), loss_ptr, cross_entropy_ptr, penalty_ptr,
                correct_ptr, invalid_ptr, BY_ROW, BLOCK,
            )  # fmt: skip
    else:
        k = (tl.program_id(0) - 1) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
        total = tl.full([BLOCK_ROWS, BLOCK_CLASSES], 0, dtype)
        for start in range(0, tile_rows, BLOCK_ROWS):
            r = start + tl.arange(0, BLOCK_ROWS)
            # int32 offsets overflow past 2**31 logits.
            i = r[:, None].to(tl.int64) * d_logits_stride + k[None, :]
            # To the next row, not to the last class: that is aligned, which wide loads need.
            mask = (r < tile_rows)[:, None] & (k < d_logits_stride)[None, :]
            total += tl.load(d_logits_ptr + i, mask=mask, other=0).to(dtype)
        earlier = tl.where(first_row > 0, classes, 0)
        d_bias = tl.sum(total, 0) + tl.load(sums_ptr + k, mask=k < earlier, other=0)
        if last:
            tl.store(d_bias_ptr + k, d_bias * tl.load(totals_ptr + 2), mask=k < classes)
        else:
            tl.store(sums_ptr + k, d_bias, mask=k < classes)
