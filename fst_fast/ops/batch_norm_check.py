"""Checks the arguments of batch_norm_act."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dtypes import DTYPES, compute_dtype

NAME = "batch_norm_act"


def check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor | None, Tensor | None, Tensor | None],
    residual: Tensor | None,
    momentum: float | None,
    eps: float,
) -> None:
    """Raise ValueError, with what was expected and what came, unless all fits together."""
    if x.dim() != 4:
        raise ValueError(f"{NAME}: x must be [N, C, H, W], got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{NAME}: x must be float64, float32, bfloat16 or float16, got {x.dtype}; use x.float()"
        )
    if x.numel() // max(x.shape[1], 1) < 2:
        raise ValueError(
            f"{NAME}: x must hold more than one value per channel, got {list(x.shape)}; "
            "use larger batches, or the model in eval mode"
        )
    running_mean, running_var, batches = statistics
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if tensor is not None:
            _check_per_channel(name, tensor, x)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"{NAME}: running_mean and running_var must be given together, got None for {missing}; "
            "pass both or neither"
        )
    if batches is not None:
        _check_counter(batches, x)
    if residual is not None:
        _check_residual(residual, x)
    _check_numbers(running_mean, batches, momentum, eps)


def _check_per_channel(name: str, tensor: Tensor, x: Tensor) -> None:
    compute = compute_dtype(x)
    if tensor.shape != x.shape[1:2]:
        raise ValueError(
            f"{NAME}: {name} must be [{x.shape[1]}] like the channels of x, got "
            f"{list(tensor.shape)}"
        )
    if tensor.dtype != compute:
        raise ValueError(
            f"{NAME}: {name} must be {compute} for x in {x.dtype}, got {tensor.dtype}; "
            f"use {name}.to({compute})"
        )
    _check_device(name, tensor, x)
    if not tensor.is_contiguous():
        raise ValueError(
            f"{NAME}: {name} must be contiguous, got strides {list(tensor.stride())}; "
            f"use {name}.contiguous()"
        )


def _check_counter(batches: Tensor, x: Tensor) -> None:
    if batches.dim() != 0 or batches.dtype != torch.int64:
        raise ValueError(
            f"{NAME}: num_batches_tracked must be 0-d int64, got {list(batches.shape)} "
            f"{batches.dtype}; use torch.tensor(0)"
        )
    _check_device("num_batches_tracked", batches, x)


def _check_residual(residual: Tensor, x: Tensor) -> None:
    if residual.shape != x.shape:
        raise ValueError(
            f"{NAME}: residual must be {list(x.shape)} like x, got {list(residual.shape)}; "
            "use residual.expand_as(x)"
        )
    if residual.dtype != x.dtype:
        raise ValueError(
            f"{NAME}: residual must be {x.dtype} like x, got {residual.dtype}; "
            f"use residual.to({x.dtype})"
        )
    _check_device("residual", residual, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(
            f"{NAME}: {name} must be on {x.device} like x, got {tensor.device}; "
            f"use {name}.to({str(x.device)!r})"
        )


def _check_numbers(
    running_mean: Tensor | None, batches: Tensor | None, momentum: float | None, eps: float
) -> None:
    if momentum is None:
        if running_mean is not None and batches is None:
            raise ValueError(
                f"{NAME}: num_batches_tracked must be given where momentum is None, got None; "
                "pass a 0-d int64 tensor or a momentum"
            )
    elif not 0 <= momentum <= 1:
        raise ValueError(f"{NAME}: momentum must be in [0, 1] or None, got {momentum}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{NAME}: eps must be finite and at least 0, got {eps}")
