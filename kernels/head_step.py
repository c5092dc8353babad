"""One SGD step of a classifier head at constant norm, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Up to here one program holds the whole head in registers.
ONE_PROGRAM = 16384
# Above it: this many elements at a time, by at most this many programs.
BLOCK = 2048
MAX_PROGRAMS = 1024


@triton.jit
def _sgd(value_ptr, d_value_ptr, momentum_ptr, offsets, mask, scale, lr, MOMENTUM: tl.constexpr):
    """m <- round(MOMENTUM * m + g); returns scale * w - lr * m, unrounded, in the type of lr."""
    value = tl.load(value_ptr + offsets, mask=mask, other=0).to(lr.dtype)
    gradient = tl.load(d_value_ptr + offsets, mask=mask, other=0).to(lr.dtype)
    momentum = tl.load(momentum_ptr + offsets, mask=mask, other=0).to(lr.dtype)
    momentum = (MOMENTUM * momentum + gradient).to(momentum_ptr.dtype.element_ty)
    tl.store(momentum_ptr + offsets, momentum, mask=mask)
    return scale * value - lr * momentum.to(lr.dtype)


@triton.jit
def _scale(norm_ptr, squares):
    """norm / ||v|| from ||v||^2, or 1 where there is no direction to keep."""
    return tl.where(squares == 0, 1.0, tl.load(norm_ptr) / tl.sqrt(squares))


@triton.jit
def head_step_small_kernel(
    weight_ptr,
    d_weight_ptr,
    weight_momentum_ptr,
    count,
    bias_ptr,
    d_bias_ptr,
    bias_momentum_ptr,
    bias_count,
    lr_ptr,
    norm_ptr,
    found_inf_ptr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BIAS: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
):
    if HAS_FOUND_INF:
        # With a count of 0 every mask is false, and nothing changes.
        step = tl.load(found_inf_ptr) == 0
        count = tl.where(step, count, 0)
        bias_count = tl.where(step, bias_count, 0)
    lr = tl.load(lr_ptr)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    value = _sgd(weight_ptr, d_weight_ptr, weight_momentum_ptr, offsets, mask, 1.0, lr, MOMENTUM)
    if PROJECT:
        value *= _scale(norm_ptr, tl.sum(value * value))
    tl.store(weight_ptr + offsets, value, mask=mask)

    offsets = tl.arange(0, BLOCK_BIAS)
    mask = offsets < bias_count
    value = _sgd(bias_ptr, d_bias_ptr, bias_momentum_ptr, offsets, mask, 1.0, lr, MOMENTUM)
    tl.store(bias_ptr + offsets, value, mask=mask)


@triton.jit
def head_step_update_kernel(
    weight_ptr,
    d_weight_ptr,
    weight_momentum_ptr,
    count,
    bias_ptr,
    d_bias_ptr,
    bias_momentum_ptr,
    bias_count,
    lr_ptr,
    weight_scale_ptr,
    found_inf_ptr,
    partials_ptr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
    DEFERRED: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
):
    """Moves momentum and bias; leaves each program's share of ||w - lr * m||^2 in partials.

    DEFERRED moves the weight too: w <- round(weight_scale * w - lr * m).
    """
    if HAS_FOUND_INF:
        step = tl.load(found_inf_ptr) == 0
        count = tl.where(step, count, 0)
        bias_count = tl.where(step, bias_count, 0)
    lr = tl.load(lr_ptr)
    scale = tl.full([], 1.0, lr.dtype)
    if DEFERRED:
        scale = tl.load(weight_scale_ptr)
    # int32 offsets overflow past 2**31 elements.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    squares = tl.zeros([BLOCK], lr.dtype)
    for start in range(first, count, stride):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < count
        value = _sgd(
            weight_ptr, d_weight_ptr, weight_momentum_ptr, offsets, mask, scale, lr, MOMENTUM
        )
        if DEFERRED:
            rounded = value.to(weight_ptr.dtype.element_ty)
            tl.store(weight_ptr + offsets, rounded, mask=mask)
            value = rounded.to(lr.dtype)
        squares += value * value
    tl.store(partials_ptr + tl.program_id(0), tl.sum(squares))
    for start in range(first, bias_count, stride):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < bias_count
        value = _sgd(bias_ptr, d_bias_ptr, bias_momentum_ptr, offsets, mask, 1.0, lr, MOMENTUM)
        tl.store(bias_ptr + offsets, value, mask=mask)


@triton.jit
def head_step_scale_kernel(
    weight_scale_ptr,
    norm_ptr,
    found_inf_ptr,
    partials_ptr,
    programs,
    MAX_PROGRAMS: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
):
    """weight_scale <- norm / ||w||, from the partials, in one program."""
    scale = tl.full([], 1.0, weight_scale_ptr.dtype.element_ty)
    if PROJECT:
        offsets = tl.arange(0, MAX_PROGRAMS)
        partials = tl.load(partials_ptr + offsets, mask=offsets < programs, other=0)
        scale = _scale(norm_ptr, tl.sum(partials))
    if HAS_FOUND_INF:
        scale = tl.where(tl.load(found_inf_ptr) == 0, scale, tl.load(weight_scale_ptr))
    tl.store(weight_scale_ptr, scale)


@triton.jit
def head_step_write_kernel(
    weight_ptr,
    weight_momentum_ptr,
    count,
    lr_ptr,
    norm_ptr,
    found_inf_ptr,
    partials_ptr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
):
    """w <- round((w - lr * m) * norm / ||v||); every program adds all partials in one order."""
    if HAS_FOUND_INF:
        count = tl.where(tl.load(found_inf_ptr) == 0, count, 0)
    lr = tl.load(lr_ptr)
    scale = tl.full([], 1.0, lr.dtype)
    if PROJECT:
        programs = tl.arange(0, MAX_PROGRAMS)
        partials = tl.load(partials_ptr + programs, mask=programs < tl.num_programs(0), other=0)
        scale = _scale(norm_ptr, tl.sum(partials))
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, count, tl.num_programs(0).to(tl.int64) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < count
        value = tl.load(weight_ptr + offsets, mask=mask, other=0).to(lr.dtype)
        momentum = tl.load(weight_momentum_ptr + offsets, mask=mask, other=0).to(lr.dtype)
        tl.store(weight_ptr + offsets, (value - lr * momentum) * scale, mask=mask)


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
    count = weight.numel()
    if count == 0:
        return
    # An absent tensor is never read; any pointer stands in for it.
    heads = [weight, d_weight, weight_momentum, count, weight, d_weight, weight_momentum, 0]
    if bias is not None:
        heads[4:] = [bias, d_bias, bias_momentum, bias.numel()]
    norm_ptr = lr if norm is None else norm
    found_inf_ptr = lr if found_inf is None else found_inf
    options = {
        "HAS_FOUND_INF": found_inf is not None,
        # Multiply and add are rounded one by one, as in eager PyTorch.
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(weight):
        if weight_scale is not None:
            scalars = (lr, norm_ptr, weight_scale, found_inf_ptr)
            _launch_deferred(heads, scalars, momentum, norm is not None, options)
            return
        launch = _launch_small if count <= ONE_PROGRAM else _launch_large
        launch(heads, lr, norm_ptr, found_inf_ptr, momentum, norm is not None, options)


def _launch_small(heads, lr, norm, found_inf, momentum, project, options):
    count, bias_count = heads[3], heads[7]
    block = triton.next_power_of_2(count)
    head_step_small_kernel[(1,)](
        *heads,
        lr,
        norm,
        found_inf,
        # A run-time float would arrive as float32; float64 heads need all of it.
        MOMENTUM=momentum,
        BLOCK=block,
        BLOCK_BIAS=triton.next_power_of_2(max(bias_count, 1)),
        PROJECT=project,
        num_warps=min(max(block // 512, 4), 16),
        **options,
    )


def _launch_update(heads, lr, weight_scale, found_inf, momentum, deferred, options):
    programs = min(triton.cdiv(heads[3], BLOCK), MAX_PROGRAMS)
    partials = torch.empty(programs, dtype=lr.dtype, device=lr.device)
    head_step_update_kernel[(programs,)](
        *heads,
        lr,
        weight_scale,
        found_inf,
        partials,
        MOMENTUM=momentum,
        BLOCK=BLOCK,
        DEFERRED=deferred,
        **options,
    )
    return programs, partials


def _launch_deferred(heads, scalars, momentum, project, options):
    lr, norm, weight_scale, found_inf = scalars
    programs, partials = _launch_update(heads, lr, weight_scale, found_inf, momentum, True, options)
    head_step_scale_kernel[(1,)](
        weight_scale,
        norm,
        found_inf,
        partials,
        programs,
        MAX_PROGRAMS=MAX_PROGRAMS,
        PROJECT=project,
        **options,
    )


def _launch_large(heads, lr, norm, found_inf, momentum, project, options):
    weight, _, weight_momentum, count = heads[:4]
    programs, partials = _launch_update(heads, lr, lr, found_inf, momentum, False, options)
    head_step_write_kernel[(programs,)](
        weight,
        weight_momentum,
        count,
        lr,
        norm,
        found_inf,
        partials,
        BLOCK=BLOCK,
        MAX_PROGRAMS=MAX_PROGRAMS,
        PROJECT=project,
        **options,
    )
