"""Checks the arguments of head_deviation_loss."""

import math

import torch
from torch import Tensor

from fst_fast.ops.dtypes import DTYPES, compute_dtype

REDUCTIONS = ("mean", "sum", "none")
NAME = "head_deviation_loss"


def check(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weight0: Tensor | None,
    class_weight: Tensor | None,
    weight_scale: Tensor | None,
    alpha_scale: Tensor | None,
    alpha: float,
    reduction: str,
    label_smoothing: float,
) -> None:
    """Refuse, in words, what ``head_deviation_loss`` cannot take."""
    compute = compute_dtype(features)
    if features.dim() != 2:
        raise ValueError(
            f"{NAME}: features must be [B, D], got {list(features.shape)}; use features.flatten(1)"
        )
    if features.dtype not in DTYPES:
        raise ValueError(
            f"{NAME}: features must be float64, float32, bfloat16 or float16, got "
            f"{features.dtype}; use features.float()"
        )
    B, D = features.shape
    if weight.dim() != 2 or weight.shape[1] != D or 0 in weight.shape:
        raise ValueError(
            f"{NAME}: weight must be [K, {D}] with K and D at least 1, like features [{B}, {D}], "
            f"got {list(weight.shape)}"
        )
    if weight.dtype not in (features.dtype, compute):
        raise ValueError(
            f"{NAME}: weight must be {features.dtype} like features, or {compute}, got "
            f"{weight.dtype}; use weight.to({features.dtype})"
        )
    K = len(weight)
    like_weight = (weight.dtype, "weight")
    _check_like("weight", weight, [K, D], like_weight, features)
    if bias is not None:
        _check_like("bias", bias, [K], like_weight, features)
    _check_like("labels", labels, [B], (torch.int64, "class indices"), features)
    if class_weight is not None:
        _check_constant("class_weight", class_weight, [K], (compute, "the loss"), features)
    if weight_scale is not None:
        _check_constant("weight_scale", weight_scale, [], (compute, "the loss"), features)
    if alpha_scale is not None:
        _check_constant("alpha", alpha_scale, [], (compute, "the loss"), features)
    elif not math.isfinite(alpha):
        raise ValueError(f"{NAME}: alpha must be finite, got {alpha}")
    if weight0 is not None:
        _check_constant("weight0", weight0, [K, D], like_weight, features)
    elif alpha != 0 or alpha_scale is not None:
        raise ValueError(
            f"{NAME}: weight0 must be the weight before tuning, got None; pass it, or alpha=0"
        )
    check_settings(NAME, reduction, label_smoothing)


def check_settings(name: str, reduction: str, label_smoothing: float) -> None:
    """Refuse what can be refused before there is a batch; ``name`` is who asks."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be mean, sum or none, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")


def _check_like(
    name: str, tensor: Tensor, shape: list[int], dtype: tuple[torch.dtype, str], features: Tensor
) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{NAME}: {name} must be {shape}, got {list(tensor.shape)}")
    if tensor.dtype != dtype[0]:
        raise ValueError(
            f"{NAME}: {name} must be {dtype[0]} like {dtype[1]}, got {tensor.dtype}; "
            f"use {name}.to({dtype[0]})"
        )
    if tensor.device != features.device:
        raise ValueError(
            f"{NAME}: {name} must be on {features.device} like features, got {tensor.device}; "
            f"use {name}.to({str(features.device)!r})"
        )


def _check_constant(
    name: str, tensor: Tensor, shape: list[int], dtype: tuple[torch.dtype, str], features: Tensor
) -> None:
    _check_like(name, tensor, shape, dtype, features)
    if tensor.requires_grad:
        raise ValueError(
            f"{NAME}: {name} must not require grad, it is a constant; use {name}.detach()"
        )
