"""The kernel of ``head_deviation_loss`` that turns rows of logits into rows of their gradient."""

import triton
import triton.language as tl

from .head_deviation_parts import (
    classify,
    d_logit,
    deviation_share,
    deviation_strength,
    row_terms,
    scalar_or_one,
    sum_labels,
)


@triton.jit
def head_deviation_rows_kernel(
    logits_ptr,  # [programs, classes]; without scale and bias
    logits_stride,
    d_logits_ptr,  # [programs, classes]; in the logits' memory, of their type or a narrower one
    d_logits_stride,
    d_logits_count,
    bias_ptr,
    bias_count,
    weight_scale_ptr,
    weight_scale_count,
    class_weight_ptr,
    class_weight_count,
    labels_ptr,
    row_grad_ptr,
    row_grad_count,
    alpha: tl.float64,
    alpha_scale_ptr,
    alpha_scale_count,
    losses_ptr,
    hits_ptr,
    totals_ptr,
    invalid_ptr,
    features_ptr,
    clean_ptr,
    clean_count,
    first_row,
    rows,
    classes,
    label_smoothing: tl.float64,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss, hit and d_logits, left to right; row 0, there or not, makes the totals.

    clean: the row's features, or 0 if it is ignored, for a product in which 0 * NaN would count.
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    d_logits_ptr += row * d_logits_stride
    row += first_row
    here = row < rows
    label = tl.load(labels_ptr + row, mask=here, other=ignore_index)
    ignored, bad, y = classify(label, classes, ignore_index)
    width = tl.where(here, classes, 0)
    scale = scalar_or_one(weight_scale_ptr, weight_scale_count, dtype)
    largest, log_total, smooth_sum, class_total, best = row_softmax(
        logits_ptr, width, logits_stride, classes, scale, bias_ptr, bias_count, class_weight_ptr,
        class_weight_count, BLOCK,
    )  # fmt: skip
    z_y = tl.load(logits_ptr + y, mask=here, other=0) * scale
    z_y += tl.load(bias_ptr + y, mask=y < bias_count, other=0).to(dtype)
    w_y = tl.load(class_weight_ptr + y, mask=y < class_weight_count, other=1).to(dtype)
    row_grad = tl.load(row_grad_ptr + row, mask=row < row_grad_count, other=1).to(tl.float64)
    loss, push, smooth = row_terms(
        (z_y - largest) - log_total, smooth_sum, w_y, row_grad, ignored, bad, classes,
        label_smoothing, dtype,
    )  # fmt: skip
    tl.store(losses_ptr + row, loss, mask=here)
    hit = (best == label) & (ignored == 0) & (bad == 0)
    tl.store(hits_ptr + row, hit.to(tl.int32), mask=here)
    for start in range(0, tl.where(here, d_logits_count, 0), BLOCK):
        k = start + tl.arange(0, BLOCK)
        z = load_logits(logits_ptr, k, width, logits_stride, scale, bias_ptr, bias_count)
        w = load_class_weights(class_weight_ptr, class_weight_count, k, width, dtype)
        p = tl.exp((z - largest) - log_total)
        d_z = d_logit(p, (k == y).to(dtype), w, class_total, push, smooth)
        # Not a product with 0: an ignored row may hold NaN.
        d_z = tl.where(ignored, 0, d_z)
        # What is stored here lies over logits of this block and of earlier ones.
        tl.debug_barrier()
        tl.store(d_logits_ptr + k, d_z, mask=k < logits_stride)
    copy_features(features_ptr, clean_ptr, row, tl.where(here, clean_count, 0), ignored, BLOCK)
    if row == 0:
        store_totals(
            labels_ptr, rows, classes, class_weight_ptr, class_weight_count, ignore_index,
            deviation_strength(alpha, alpha_scale_ptr, alpha_scale_count), row_grad_ptr,
            row_grad_count, scale, totals_ptr, invalid_ptr, MEAN, BLOCK,
        )  # fmt: skip


@triton.jit
def load_logits(logits_ptr, k, width, logits_stride, scale, bias_ptr, bias_count):
    """Scaled and with bias; -inf past the end."""
    # To the next row, not to the last class: that is aligned, which wide loads need.
    z = tl.load(logits_ptr + k, mask=k < logits_stride, other=0) * scale
    z += tl.load(bias_ptr + k, mask=k < bias_count, other=0).to(z.dtype)
    return tl.where(k < width, z, float("-inf"))


@triton.jit
def load_class_weights(class_weight_ptr, class_weight_count, k, width, dtype: tl.constexpr):
    w = tl.load(class_weight_ptr + k, mask=k < class_weight_count, other=1).to(dtype)
    return tl.where(k < width, w, 0)


@triton.jit
def finite_or_zero(largest):
    """A maximum to subtract: -inf - -inf would be NaN."""
    return tl.where(largest == float("-inf"), 0, largest)


@triton.jit
def row_softmax(
    logits_ptr,
    width,
    logits_stride,
    classes,
    scale,
    bias_ptr,
    bias_count,
    class_weight_ptr,
    class_weight_count,
    BLOCK: tl.constexpr,
):
    """largest, log(total), sum of w * log_p, sum of w, and the best class of a row, in one sweep.

    A NaN makes the number of classes the best, which is no label's class.
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    largest = tl.full([BLOCK], float("-inf"), dtype)
    total = tl.full([BLOCK], 0, dtype)
    smooth_sum = tl.full([BLOCK], 0, dtype)
    class_total = tl.full([BLOCK], 0, dtype)
    best = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        z = load_logits(logits_ptr, k, width, logits_stride, scale, bias_ptr, bias_count)
        w = load_class_weights(class_weight_ptr, class_weight_count, k, width, dtype)
        best = tl.where((z > largest) & (best < classes), k, best)
        best = tl.where(z != z, classes, best)
        now = finite_or_zero(tl.maximum(largest, z))
        total = total * tl.exp(largest - now) + tl.where(k < width, tl.exp(z - now), 0)
        smooth_sum += class_total * (finite_or_zero(largest) - now)
        smooth_sum += tl.where(k < width, w * (z - now), 0)
        class_total += w
        largest = tl.maximum(largest, z)
    row_largest = tl.max(largest)
    now = finite_or_zero(row_largest)
    log_total = tl.log(tl.sum(total * tl.exp(largest - now)))
    row_class_total = tl.sum(class_total)
    smooth_sum = tl.sum(smooth_sum + class_total * (finite_or_zero(largest) - now))
    smooth_sum -= row_class_total * log_total
    # Of equal logits the first counts.
    first = tl.min(tl.where(largest == row_largest, best, classes))
    row_best = tl.where(tl.max(best) == classes, classes, first)
    return row_largest, log_total, smooth_sum, row_class_total, row_best


@triton.jit
def copy_features(features_ptr, clean_ptr, row, count, ignored, BLOCK: tl.constexpr):
    features_ptr += row * count
    clean_ptr += row * count
    used = tl.where(ignored, 0, count)
    for start in range(0, count, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(features_ptr + d, mask=d < used, other=0)
        tl.store(clean_ptr + d, x, mask=d < count)


@triton.jit
def store_totals(
    labels_ptr,
    rows,
    classes,
    class_weight_ptr,
    class_weight_count,
    ignore_index,
    strength,
    row_grad_ptr,
    row_grad_count,
    scale,
    totals_ptr,
    invalid_ptr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of all rows: [what the loss is divided by, share of W0 in d_weight, factor, factor * scale].

    factor: what products of d_logits are yet to be multiplied by. In d_logits it would take them
    below what float16 can hold. 0 if every row is ignored, where 1 / 0 would make NaN of zeros.
    """
    dtype: tl.constexpr = scale.dtype
    norm, invalid, used = sum_labels(
        labels_ptr, rows, classes, class_weight_ptr, class_weight_count, ignore_index, dtype, BLOCK
    )
    share = deviation_share(strength, row_grad_ptr, row_grad_count, dtype, BLOCK)
    factor = tl.full([], 1, dtype)
    if MEAN:
        if row_grad_count < 0:
            factor = tl.where(used, 1 / norm, 0)
    else:
        norm = tl.full([], 1, dtype)
    tl.store(totals_ptr, norm)
    tl.store(totals_ptr + 1, share)
    tl.store(totals_ptr + 2, factor)
    tl.store(totals_ptr + 3, factor * scale)
    tl.store(invalid_ptr, invalid.to(tl.int64))
