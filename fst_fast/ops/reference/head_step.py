"""One SGD step of a classifier head at constant norm, in plain PyTorch."""

import torch
from torch import Tensor


def head_step_(
    weight: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    d_weight: Tensor,  # [K, D]
    d_bias: Tensor | None,  # [K]
    weight_momentum: Tensor,  # [K, D]
    bias_momentum: Tensor | None,  # [K]
    lr: Tensor,
    momentum: float,
    norm: Tensor | None,
    weight_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """See ``fst_fast.ops.head_step_``."""
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32

    def step(value: Tensor, gradient: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        new_buffer = (momentum * buffer.to(compute) + gradient.to(compute)).to(buffer.dtype)
        return value.to(compute) - lr * new_buffer.to(compute), new_buffer

    old_weight = weight if weight_scale is None else weight.to(compute) * weight_scale
    new_weight, new_momentum = step(old_weight, d_weight, weight_momentum)
    if weight_scale is not None:
        new_weight = new_weight.to(weight.dtype)
    scale = torch.ones_like(lr)
    if norm is not None:
        # float32 squares added up in float32 lose digits that a truth should have.
        length = torch.linalg.vector_norm(new_weight, dtype=torch.float64)
        scale = torch.where(length == 0, 1.0, norm / length).to(compute)
    updates = [(weight_momentum, new_momentum)]
    if weight_scale is None:
        updates.append((weight, new_weight * scale))
    else:
        updates += [(weight, new_weight), (weight_scale, scale)]
    if bias is not None and d_bias is not None and bias_momentum is not None:
        new_bias, new_momentum = step(bias, d_bias, bias_momentum)
        updates += [(bias, new_bias), (bias_momentum, new_momentum)]

    for old, new in updates:
        # Decided where the tensor lives: reading found_inf here would stall the device.
        old.copy_(new if found_inf is None else torch.where(found_inf != 0, old, new))
