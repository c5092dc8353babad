"""One SGD step of a classifier head at constant norm."""

import math

import torch
from torch import Tensor

from fst_fast.ops import backends
from fst_fast.ops.dtypes import DTYPES, compute_dtype


def head_step_(
    weight: Tensor,
    bias: Tensor | None,
    d_weight: Tensor,
    d_bias: Tensor | None,
    weight_momentum: Tensor,
    bias_momentum: Tensor | None,
    *,
    lr: float | Tensor,
    momentum: float = 0.9,
    norm: float | Tensor | None = None,
    weight_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Step a classifier head in place, then bring its weight back to a fixed norm.

    Feature Shift Tuning (arXiv 2310.01875, section 3) tunes with SGD and holds ``||W||`` at the
    value it had before tuning. SGD is ``torch.optim.SGD`` with neither dampening, weight decay
    nor Nesterov::

        weight_momentum = round(momentum * weight_momentum + d_weight)
        v = weight - lr * weight_momentum
        weight = round(v * norm / v.norm())         # round(v) if norm is None or v is all zeros

    The bias takes the same step and is never projected.

    A head too large for the caches is read and written twice that way, because the norm is known
    only when all of it has moved. With ``weight_scale`` the head is ``weight_scale * weight`` and
    one pass is enough: the scaling waits for the next step::

        weight = round(weight_scale * weight - lr * weight_momentum)
        weight_scale = norm / weight.norm()         # 1 if norm is None or weight is all zeros

    Args:
        weight: [K, D] float64, float32, bfloat16 or float16, contiguous; changed in place.
        bias: [K], same dtype, contiguous, changed in place; None if the head has none.
        d_weight: [K, D], same dtype; copied first if not contiguous.
        d_bias: [K], same dtype; None without bias.
        weight_momentum: [K, D], same dtype, contiguous, changed in place; zeros before step one.
        bias_momentum: [K], likewise; None without bias.
        lr: a float, or a 0-d tensor on the same device. A CUDA graph bakes a float in and reads a
            tensor at every replay.
        momentum: in [0, 1).
        norm: the Frobenius norm to hold, a float or a 0-d tensor like ``lr``; None leaves it free.
        weight_scale: 0-d tensor in the compute dtype, changed in place; ones before step one.
        found_inf: 0-d float32 tensor as of ``torch.amp.GradScaler``, read on the device; if it is
            not zero, nothing changes.
        backend: one of reference, cpu, triton, cuda; None takes the best available.

    Computed in float32 (float64 for float64): multiply and add are rounded one by one, and ``v``
    not at all before it is scaled. The same input gives the same bits every time. NaN and inf in a
    gradient reach the weight. Runs under ``no_grad``, so leaf parameters are welcome. A head
    without elements (K or D is 0) is left as it is.

    Raises:
        ValueError: a shape, dtype, device, layout or value differs from the above.
        RuntimeError: ``backend`` cannot run here.

    Example:
        >>> weight, gradient, momentum = torch.ones(2, 2), torch.ones(2, 2), torch.zeros(2, 2)
        >>> fst_fast.ops.head_step_(weight, None, gradient, None, momentum, None, lr=0.1, norm=4.0)
        >>> weight
        tensor([[2., 2.],
                [2., 2.]])
    """
    _check_tensors(weight, bias, d_weight, d_bias, weight_momentum, bias_momentum)
    if not 0 <= momentum < 1:
        raise ValueError(f"head_step_: momentum must be in [0, 1), got {momentum}")
    lr = _scalar("lr", lr, weight)
    norm = None if norm is None else _scalar("norm", norm, weight)
    if weight_scale is not None:
        _check_scalar("weight_scale", weight_scale, weight)
        if weight_scale.dtype != lr.dtype:
            raise ValueError(
                f"head_step_: weight_scale must be {lr.dtype}, got {weight_scale.dtype}"
            )
    if found_inf is not None:
        _check_scalar("found_inf", found_inf, weight)
        if found_inf.dtype != torch.float32:
            raise ValueError(f"head_step_: found_inf must be float32, got {found_inf.dtype}")
    with torch.no_grad():
        torch.ops.fst_fast.head_step_.default(
            weight,
            bias,
            d_weight.contiguous(),
            None if d_bias is None else d_bias.contiguous(),
            weight_momentum,
            bias_momentum,
            lr,
            momentum,
            norm,
            weight_scale,
            found_inf,
            backend or "",
        )


# The wrapper of torch.library.custom_op costs a small head more than the step itself does.
torch.library.define(
    "fst_fast::head_step_",
    "(Tensor(a!) weight, Tensor(b!)? bias, Tensor d_weight, Tensor? d_bias, "
    "Tensor(c!) weight_momentum, Tensor(d!)? bias_momentum, Tensor lr, float momentum, "
    "Tensor? norm, Tensor(e!)? weight_scale, Tensor? found_inf, str backend) -> ()",
)


@torch.library.impl("fst_fast::head_step_", "default")
def _head_step(
    weight: Tensor,
    bias: Tensor | None,
    d_weight: Tensor,
    d_bias: Tensor | None,
    weight_momentum: Tensor,
    bias_momentum: Tensor | None,
    lr: Tensor,
    momentum: float,
    norm: Tensor | None,
    weight_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str,
) -> None:
    function = backends.choose("head_step_", weight.device, backend or None)
    if weight.numel() == 0:
        return
    function(
        weight,
        bias,
        d_weight,
        d_bias,
        weight_momentum,
        bias_momentum,
        lr,
        momentum,
        norm,
        weight_scale,
        found_inf,
    )
    changed = (weight, bias, weight_momentum, bias_momentum, weight_scale)
    # Autograd then notices a graph that saved the old values.
    torch.autograd.graph.increment_version([tensor for tensor in changed if tensor is not None])


@torch.library.register_fake("fst_fast::head_step_")
def _(*arguments: object) -> None:
    """Nothing is returned, so there is no shape to foretell."""


def _check_tensors(
    weight: Tensor,
    bias: Tensor | None,
    d_weight: Tensor,
    d_bias: Tensor | None,
    weight_momentum: Tensor,
    bias_momentum: Tensor | None,
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"head_step_: weight must be [K, D], got {list(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise ValueError(
            "head_step_: weight must be float64, float32, bfloat16 or float16, "
            f"got {weight.dtype}; use weight.float()"
        )
    _check_in_place("weight", weight)
    _check_like("d_weight", d_weight, "weight", weight, weight.shape)
    _check_like("weight_momentum", weight_momentum, "weight", weight, weight.shape)
    _check_in_place("weight_momentum", weight_momentum)
    if bias is None and d_bias is None and bias_momentum is None:
        return
    if bias is None or d_bias is None or bias_momentum is None:
        missing = [
            name
            for name, tensor in (
                ("bias", bias),
                ("d_bias", d_bias),
                ("bias_momentum", bias_momentum),
            )
            if tensor is None
        ]
        raise ValueError(
            "head_step_: bias, d_bias and bias_momentum must be given together, "
            f"got None for {', '.join(missing)}; pass all three or none"
        )
    _check_like("bias", bias, "the rows of weight", weight, weight.shape[:1])
    _check_like("d_bias", d_bias, "bias", bias, bias.shape)
    _check_like("bias_momentum", bias_momentum, "bias", bias, bias.shape)
    _check_in_place("bias", bias)
    _check_in_place("bias_momentum", bias_momentum)


def _check_like(name: str, tensor: Tensor, like: str, model: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"head_step_: {name} must be {list(shape)} like {like}, got {list(tensor.shape)}"
        )
    if tensor.dtype != model.dtype:
        raise ValueError(
            f"head_step_: {name} must be {model.dtype} like {like}, got {tensor.dtype}; "
            f"use {name}.to({model.dtype})"
        )
    if tensor.device != model.device:
        raise ValueError(
            f"head_step_: {name} must be on {model.device} like {like}, got {tensor.device}; "
            f"use {name}.to({str(model.device)!r})"
        )


def _check_in_place(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"head_step_: {name} must be contiguous to be changed in place, "
            f"got strides {list(tensor.stride())}; use {name}.contiguous()"
        )


def _check_scalar(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.dim() != 0:
        raise ValueError(f"head_step_: {name} must be 0-d, got {list(tensor.shape)}; use {name}[0]")
    if tensor.device != weight.device:
        raise ValueError(
            f"head_step_: {name} must be on {weight.device} like weight, got {tensor.device}; "
            f"use {name}.to({str(weight.device)!r})"
        )


def _scalar(name: str, value: float | Tensor, weight: Tensor) -> Tensor:
    """The value as a 0-d tensor in the compute dtype, without waiting for the device."""
    compute = compute_dtype(weight)
    if isinstance(value, Tensor):
        _check_scalar(name, value, weight)
        return value.detach().to(compute)
    if not 0 <= value < math.inf:
        raise ValueError(f"head_step_: {name} must be finite and at least 0, got {value}")
    return torch.full((), value, dtype=compute, device=weight.device)
