"""Batch norm in training mode, an addition and a ReLU, in plain PyTorch."""

import torch
from torch import Tensor

from ..dtypes import compute_dtype


def batch_norm_act(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    residual: Tensor | None,  # like x
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``fst_fast.ops.batch_norm_act``; returns y, mean [C] and variance [C]."""
    values = x.to(compute_dtype(x))
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    y = activation_input(x, weight, bias, residual, mean, var, eps)
    return (y.relu() if relu else y).to(x.dtype), mean, var


def per_channel(values: Tensor) -> Tensor:
    """[C] as [1, C, 1, 1]."""
    return values.view(1, -1, 1, 1)


def scale_of(weight: Tensor | None, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the factor of each channel, and its part that is 1 / standard deviation."""
    rstd = 1 / (var + eps).sqrt()
    return (rstd if weight is None else weight * rstd), rstd


def activation_input(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """Return the input of the ReLU, in the compute dtype."""
    scale, _ = scale_of(weight, var, eps)
    y = (x.to(mean.dtype) - per_channel(mean)) * per_channel(scale)
    if bias is not None:
        y = y + per_channel(bias)
    return y if residual is None else y + residual.to(mean.dtype)
