"""The gradients of batch_norm_act, in plain PyTorch."""

import torch
from torch import Tensor

from .batch_norm_act import activation_input, per_channel, scale_of


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
    """Gradients of x, weight, bias and residual; those not in the mask are empty.

    ``output_mask``: of x, of weight and bias together, of residual.
    """
    gradient = d_y.to(mean.dtype)
    if relu:
        given = activation_input(x, weight, bias, residual, mean, var, eps)
        # NaN passes, as in PyTorch.
        gradient = torch.where(given <= 0, 0, gradient)
    apart = x.to(mean.dtype) - per_channel(mean)
    scale, rstd = scale_of(weight, var, eps)
    total, product = gradient.sum((0, 2, 3)), (gradient * apart).sum((0, 2, 3))
    count = x.numel() // x.shape[1]
    d_x = gradient - per_channel(total / count) - apart * per_channel(product * rstd**2 / count)
    d_x = (d_x * per_channel(scale)).to(x.dtype)
    wants_x, wants_weight, wants_residual = output_mask
    # No two results may be one tensor, nor a result an argument.
    return (
        d_x if wants_x else x.new_empty(0),
        product * rstd if wants_weight else mean.new_empty(0),
        total if wants_weight else mean.new_empty(0),
        gradient.to(x.dtype, copy=True) if wants_residual else x.new_empty(0),
    )
