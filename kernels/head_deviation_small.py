"""``head_deviation_loss`` for few classes: two launches, plain multiply-adds in the compute type.

The work is far below what one launch costs, so it is spread thin: a program per row, then a
program per class and slice of D. Both read the small operand again and again, from the cache.
"""

import torch
import triton
import triton.language as tl

from .head_deviation_parts import (
    Problem,
    classify,
    d_logit,
    deviation_share,
    deviation_strength,
    finish_losses,
    load_weight,
    row_terms,
    scalar_or_one,
    store_overlap,
    sum_labels,
    sum_vector,
)

MAX_CLASSES = 64
MAX_ROWS = 1024
# Rows times classes. Above it, reading the operands once per row and per class costs more than the
# launches that this saves.
MAX_LOGITS = 16384
# Elements of the weight that one program holds; half of it in float64, or registers spill.
TILE = 8192
# Features of which one program makes d_weight.
SLICE = 64


def is_small(rows: int, features: int, classes: int) -> bool:
    return classes <= MAX_CLASSES and rows <= MAX_ROWS and rows * classes <= MAX_LOGITS


@triton.jit
def log_softmax_and_hit(z, k, y, valid):
    """Of one row; hit: class y has the largest logit, and of equal ones is the first."""
    largest = tl.max(z)
    total = tl.sum(tl.where(valid, tl.exp(z - largest), 0))
    log_p = tl.where(valid, (z - largest) - tl.log(total), 0)
    z_y = tl.sum(tl.where(k == y, z, 0))
    # A NaN compares false, whichever it is.
    below = tl.where(k < y, z < z_y, z <= z_y)
    return log_p, tl.sum(((below == 0) & valid).to(tl.int32)) == 0


@triton.jit
def head_deviation_small_rows_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    bias_count,
    labels_ptr,
    weight0_ptr,
    weight0_count,
    class_weight_ptr,
    class_weight_count,
    row_grad_ptr,
    row_grad_count,
    weight_scale_ptr,
    weight_scale_count,
    losses_ptr,
    hits_ptr,
    overlaps_ptr,
    d_logits_ptr,
    d_features_ptr,
    d_features_count,
    rows,
    features,
    classes,
    label_smoothing: tl.float64,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """One row: loss, hit, d_logits [K, B], d_features; and a share of <W, W0>."""
    dtype: tl.constexpr = losses_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    # An empty batch still has one program, for its share. The interpreter takes no mask that a
    # scalar and a block make together, hence counts.
    here = row < rows
    features_here = tl.where(here, features, 0)
    k = tl.arange(0, BLOCK_CLASSES)
    valid = k < classes
    columns = tl.arange(0, BLOCK_FEATURES)
    products = tl.full([BLOCK_CLASSES, BLOCK_FEATURES], 0, dtype)
    for start in range(0, features, BLOCK_FEATURES):
        d = start + columns
        x = tl.load(features_ptr + row * features + d, mask=d < features_here, other=0)
        tile = load_weight(weight_ptr, k, d, classes, features, dtype)
        products += x.to(dtype)[None, :] * tile
    scale = scalar_or_one(weight_scale_ptr, weight_scale_count, dtype)
    z = tl.sum(products, 1) * scale
    z += tl.load(bias_ptr + k, mask=k < bias_count, other=0).to(dtype)
    z = tl.where(valid, z, float("-inf"))

    label = tl.load(labels_ptr + row, mask=here, other=ignore_index)
    ignored, bad, y = classify(label, classes, ignore_index)
    log_p, hit = log_softmax_and_hit(z, k, y, valid)
    w = tl.load(class_weight_ptr + k, mask=k < class_weight_count, other=1).to(dtype)
    w = tl.where(valid, w, 0)
    if MEAN:
        norm, _, _ = sum_labels(
            labels_ptr, rows, classes, class_weight_ptr, class_weight_count, ignore_index, dtype,
            BLOCK_ROWS,
        )  # fmt: skip
        row_grad = 1.0 / norm.to(tl.float64)
    else:
        row_grad = tl.load(row_grad_ptr + row, mask=row < row_grad_count, other=1).to(tl.float64)
    loss, push, smooth = row_terms(
        tl.sum(tl.where(k == y, log_p, 0)), tl.sum(w * log_p),
        tl.sum(tl.where(k == y, w, 0)), row_grad, ignored, bad, classes, label_smoothing, dtype,
    )  # fmt: skip
    tl.store(losses_ptr + row, loss, mask=here)
    tl.store(hits_ptr + row, (hit & (bad == 0) & (ignored == 0)).to(tl.int32), mask=here)

    d_z = d_logit(tl.exp(log_p), (k == y).to(dtype), w, tl.sum(w), push, smooth)
    d_z = tl.where((ignored == 0) & valid, d_z, 0)
    tl.store(d_logits_ptr + k * rows + row, d_z, mask=k < tl.where(here, classes, 0))
    for start in range(0, d_features_count, BLOCK_FEATURES):
        d = start + columns
        tile = load_weight(weight_ptr, k, d, classes, features, dtype)
        d_x = tl.sum(d_z[:, None] * tile, 0) * scale
        tl.store(d_features_ptr + row * features + d, d_x, mask=d < features_here)
    store_overlap(weight_ptr, weight0_ptr, weight0_count, overlaps_ptr, BLOCK_FEATURES)


@triton.jit
def head_deviation_small_weight_kernel(
    features_ptr,
    labels_ptr,
    weight0_ptr,
    weight0_count,
    class_weight_ptr,
    class_weight_count,
    row_grad_ptr,
    row_grad_count,
    weight_scale_ptr,
    weight_scale_count,
    alpha: tl.float64,
    alpha_scale_ptr,
    alpha_scale_count,
    losses_ptr,
    hits_ptr,
    overlaps_ptr,
    overlaps_count,
    d_logits_ptr,
    d_weight_ptr,
    d_weight_count,
    d_bias_ptr,
    d_bias_count,
    loss_ptr,
    cross_entropy_ptr,
    penalty_ptr,
    correct_ptr,
    invalid_ptr,
    rows,
    features,
    classes,
    ignore_index,
    MEAN: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Program 0 finishes the losses; every other adds up one class's slice of d_weight."""
    dtype: tl.constexpr = losses_ptr.dtype.element_ty
    strength = deviation_strength(alpha, alpha_scale_ptr, alpha_scale_count)
    if tl.program_id(0) == 0:
        norm, invalid, _ = sum_labels(
            labels_ptr, rows, classes, class_weight_ptr, class_weight_count, ignore_index, dtype,
            BLOCK_ALL,
        )  # fmt: skip
        if not MEAN:
            norm = tl.full([], 1, dtype)
        overlap = sum_vector(overlaps_ptr, overlaps_count, tl.float64, BLOCK_ALL)
        overlap *= scalar_or_one(weight_scale_ptr, weight_scale_count, tl.float64)
        penalty = (strength * overlap).to(dtype)
        finish_losses(
            losses_ptr, hits_ptr, rows, norm, invalid, penalty,
            loss_ptr, cross_entropy_ptr, penalty_ptr, correct_ptr, invalid_ptr, BY_ROW, BLOCK_ALL,
        )  # fmt: skip
    else:
        slices = tl.cdiv(features, BLOCK_FEATURES)
        k = ((tl.program_id(0) - 1) // slices).to(tl.int64)
        first = ((tl.program_id(0) - 1) % slices) * BLOCK_FEATURES
        d = first + tl.arange(0, BLOCK_FEATURES)
        products = tl.full([BLOCK_ROWS, BLOCK_FEATURES], 0, dtype)
        d_bias = tl.full([BLOCK_ROWS], 0, dtype)
        for start in range(0, rows, BLOCK_ROWS):
            i = start + tl.arange(0, BLOCK_ROWS)
            d_z = tl.load(d_logits_ptr + k * rows + i, mask=i < rows, other=0)
            # Not a product with 0: an ignored row may hold NaN.
            used = tl.load(labels_ptr + i, mask=i < rows, other=ignore_index) != ignore_index
            x_ptr = features_ptr + i[:, None].to(tl.int64) * features + d[None, :]
            x = tl.load(x_ptr, mask=used[:, None] & (d < features)[None, :], other=0)
            products += d_z[:, None] * x.to(dtype)
            d_bias += d_z
        share = deviation_share(strength, row_grad_ptr, row_grad_count, dtype, BLOCK_ALL)
        i = k * features + d
        w0 = tl.load(weight0_ptr + i, mask=(d < features) & (i < weight0_count), other=0).to(dtype)
        d_w = tl.sum(products, 0)
        d_w += tl.where(weight0_count > 0, share * w0, 0)
        tl.store(d_weight_ptr + i, d_w, mask=(d < features) & (i < d_weight_count))
        tl.store(d_bias_ptr + k, tl.sum(d_bias), mask=(first == 0) & (k < d_bias_count))


def _losses(problem: Problem) -> torch.Tensor:
    if problem.reduction == "none":
        return problem.output.cross_entropy
    return torch.empty_like(problem.labels, dtype=problem.compute)


def run_small(problem: Problem) -> None:
    o, optional = problem.output, problem.optional
    B, D, K = problem.sizes
    device = problem.features.device
    losses = _losses(problem)
    hits = torch.empty(B, dtype=torch.int32, device=device)
    d_logits = torch.empty(K, B, dtype=problem.compute, device=device)
    overlaps = torch.empty(max(B, 1), dtype=torch.float64, device=device)
    block_all = max(triton.next_power_of_2(B), 16)
    block_classes = max(triton.next_power_of_2(K), 2)
    tile = TILE // (2 if problem.compute == torch.float64 else 1)
    block_features = max(min(triton.next_power_of_2(D), tile // block_classes), 16)
    head_deviation_small_rows_kernel[(max(B, 1),)](
        problem.features,
        problem.weight,
        *optional(problem.bias),
        problem.labels,
        *optional(problem.weight0),
        *optional(problem.class_weight),
        *problem.row_grads(),
        *optional(problem.weight_scale),
        losses,
        hits,
        overlaps,
        d_logits,
        o.d_features,
        D if problem.wanted[0] else 0,
        B,
        D,
        K,
        problem.label_smoothing,
        problem.ignore_index,
        MEAN=problem.reduction == "mean" and problem.row_grad is None,
        BLOCK_ROWS=block_all,
        BLOCK_CLASSES=block_classes,
        BLOCK_FEATURES=block_features,
        enable_fp_fusion=True,
        num_warps=8 if block_features * block_classes >= tile else 4,
    )
    _run_weight(problem, losses, hits, overlaps, d_logits, block_all)


def _run_weight(problem, losses, hits, overlaps, d_logits, block_all) -> None:
    o, optional = problem.output, problem.optional
    B, D, K = problem.sizes
    programs = K * triton.cdiv(D, SLICE) if problem.wanted[1] or problem.wanted[2] else 0
    head_deviation_small_weight_kernel[(1 + programs,)](
        problem.features,
        problem.labels,
        *optional(problem.weight0),
        *optional(problem.class_weight),
        *problem.row_grads(),
        *optional(problem.weight_scale),
        *problem.strength(),
        losses,
        hits,
        overlaps,
        len(overlaps),
        d_logits,
        o.d_weight,
        o.d_weight.numel(),
        o.d_bias,
        o.d_bias.numel(),
        *problem.results(),
        B,
        D,
        K,
        problem.ignore_index,
        MEAN=problem.reduction == "mean",
        BY_ROW=problem.reduction == "none",
        BLOCK_ALL=block_all,
        BLOCK_ROWS=min(block_all, 128),
        BLOCK_FEATURES=SLICE,
        enable_fp_fusion=True,
        num_warps=8 if block_all >= 128 else 4,
    )
