"""What the kernels of ``head_deviation_loss`` share: the problem on the host, parts in Triton.

Kernels take an optional tensor as (pointer, count). With a count of 0 every mask is false, so an
absent tensor is never read and any pointer stands in for it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass
class Problem:
    """The arguments of the op, contiguous, and the tensors that it returns."""

    features: Tensor  # [B, D]
    weight: Tensor  # [K, D]
    bias: Tensor | None  # [K]
    labels: Tensor  # [B]
    weight0: Tensor | None  # [K, D]; None also where alpha is 0
    class_weight: Tensor | None  # [K]
    row_grad: Tensor | None  # [B]
    weight_scale: Tensor | None
    alpha_scale: Tensor | None
    alpha: float
    reduction: str
    label_smoothing: float
    ignore_index: int
    wanted: tuple[bool, bool, bool]  # gradients of features, weight and bias
    compute: torch.dtype
    output: "Output"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, D, K."""
        return (*self.features.shape, len(self.weight))

    def optional(self, tensor: Tensor | None) -> tuple[Tensor, int]:
        """The pair that a kernel takes; the stand-in has the dtype most of them have."""
        return (self.output.penalty, 0) if tensor is None else (tensor, tensor.numel())

    def row_grads(self) -> tuple[Tensor, int]:
        """As ``optional``, but -1 if absent: those of an empty batch are present, and no rows."""
        return self.optional(self.row_grad) if self.row_grad is not None else (self.labels, -1)

    def strength(self) -> tuple:
        """What ``deviation_strength`` takes."""
        return (self.alpha, *self.optional(self.alpha_scale))

    def results(self) -> tuple:
        """Where ``finish_losses`` stores."""
        o = self.output
        return (o.loss, o.cross_entropy, o.penalty, o.correct, o.invalid)


class Output(NamedTuple):
    loss: Tensor
    cross_entropy: Tensor
    penalty: Tensor
    correct: Tensor
    invalid: Tensor
    d_features: Tensor
    d_weight: Tensor
    d_bias: Tensor


@triton.jit
def scalar_or_one(ptr, count, dtype: tl.constexpr):
    return tl.load(ptr, mask=count > 0, other=1).to(dtype)


@triton.jit
def classify(label, classes, ignore_index):
    """ignored, out of range, and a class that is safe to index with."""
    ignored = label == ignore_index
    bad = ((label < 0) | (label >= classes)) & (ignored == 0)
    return ignored, bad, tl.where(ignored | bad, 0, label)


@triton.jit
def sum_labels(
    labels_ptr,
    rows,
    classes,
    class_weight_ptr,
    class_weight_count,
    ignore_index,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a mean divides by; the first row whose label is out of range, or -1; is any row used?"""
    counted = tl.full([BLOCK], 0, dtype)
    # rows + 1: an ignored row, of no further interest.
    first_bad = tl.full([BLOCK], 0, tl.int32) + (rows + 1)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        label = tl.load(labels_ptr + i, mask=i < rows, other=ignore_index)
        ignored, bad, safe = classify(label, classes, ignore_index)
        w = tl.load(class_weight_ptr + safe, mask=(safe < class_weight_count) & (i < rows), other=1)
        counted += tl.where(ignored, 0, w.to(dtype))
        first_bad = tl.minimum(first_bad, tl.where(bad, i, tl.where(ignored, rows + 1, rows)))
    first = tl.min(first_bad)
    return tl.sum(counted), tl.where(first >= rows, -1, first), first <= rows


@triton.jit
def sum_vector(ptr, count, dtype: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.full([BLOCK], 0, dtype)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + i, mask=i < count, other=0).to(dtype)
    return tl.sum(total)


@triton.jit
def deviation_strength(alpha, alpha_scale_ptr, alpha_scale_count):
    scale = scalar_or_one(alpha_scale_ptr, alpha_scale_count, tl.float64)
    return tl.full([], alpha, tl.float64) * scale


@triton.jit
def deviation_share(
    strength, row_grad_ptr, row_grad_count, dtype: tl.constexpr, BLOCK: tl.constexpr
):
    """The factor of W0 in d_weight: the penalty is in every row's loss."""
    share = strength.to(dtype)
    if row_grad_count >= 0:
        share *= sum_vector(row_grad_ptr, row_grad_count, dtype, BLOCK)
    return share


@triton.jit
def row_terms(
    log_y,
    smooth_sum,
    y_weight,
    row_grad,
    ignored,
    bad,
    classes,
    label_smoothing,
    dtype: tl.constexpr,
):
    """loss, and the factors (push, smooth) that ``d_logit`` takes."""
    smoothing = tl.full([], label_smoothing, tl.float64)
    # In float64 until the end: a factor's rounding would be every gradient's of the row.
    keep = (1.0 - smoothing) * y_weight.to(tl.float64)
    smooth = smoothing / classes
    loss = -keep * log_y
    # Without smoothing the sum may be infinite, and 0 times it is NaN.
    loss -= tl.where(smooth > 0, smooth * smooth_sum, 0)
    nan = tl.full([], float("nan"), tl.float64)
    loss = tl.where(bad, nan, tl.where(ignored, 0, loss))
    scale = tl.where(bad, nan, row_grad)
    return loss.to(dtype), (keep * scale).to(dtype), (smooth * scale).to(dtype)


@triton.jit
def d_logit(p, labelled, w, class_total, push, smooth):
    # Differences first: at p = 1 they are exact, and what is left of a sum of them is not.
    return push * (p - labelled) + smooth * (p * class_total - w)


@triton.jit
def finish_losses(
    losses_ptr,
    hits_ptr,
    rows,
    norm,
    invalid,
    penalty,
    loss_ptr,
    cross_entropy_ptr,
    penalty_ptr,
    correct_ptr,
    invalid_ptr,
    BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up rows in a fixed order; BY_ROW keeps them apart, cross_entropy being losses."""
    total = tl.full([BLOCK], 0, penalty.dtype)
    hits = tl.full([BLOCK], 0, tl.int64)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        loss = tl.load(losses_ptr + i, mask=i < rows, other=0)
        if BY_ROW:
            tl.store(loss_ptr + i, loss + penalty, mask=i < rows)
        total += loss
        hits += tl.load(hits_ptr + i, mask=i < rows, other=0)
    if not BY_ROW:
        cross_entropy = (tl.sum(total).to(tl.float64) / norm.to(tl.float64)).to(penalty.dtype)
        tl.store(cross_entropy_ptr, cross_entropy)
        tl.store(loss_ptr, cross_entropy + penalty)
    tl.store(penalty_ptr, penalty)
    tl.store(correct_ptr, tl.sum(hits))
    tl.store(invalid_ptr, invalid.to(tl.int64))


@triton.jit
def load_weight(weight_ptr, k, d, classes, features, dtype: tl.constexpr):
    mask = (k < classes)[:, None] & (d < features)[None, :]
    weight_ptr += k[:, None].to(tl.int64) * features + d[None, :]
    return tl.load(weight_ptr, mask=mask, other=0).to(dtype)


@triton.jit
def store_overlap(weight_ptr, weight0_ptr, count, overlaps_ptr, BLOCK: tl.constexpr):
    """This program's share of <W, W0>, in float64: a long sum of either sign loses digits."""
    share = tl.cdiv(count, tl.num_programs(0))
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, count)
    overlap = tl.full([BLOCK], 0, tl.float64)
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w = tl.load(weight_ptr + i, mask=i < end, other=0).to(tl.float64)
        overlap += w * tl.load(weight0_ptr + i, mask=i < end, other=0).to(tl.float64)
    tl.store(overlaps_ptr + tl.program_id(0), tl.sum(overlap))
