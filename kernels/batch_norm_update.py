"""Running statistics of batch norm, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def batch_norm_update_kernel(
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    channels,
    count,
    MOMENTUM: tl.constexpr,
    COUNTS: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, which counts the batch up; CUMULATIVE: the share is 1 / batches."""
    compute = mean_ptr.dtype.element_ty
    now = tl.full([], MOMENTUM, tl.float64)
    if COUNTS:
        batches = tl.load(batches_ptr) + 1
        tl.store(batches_ptr, batches)
        if CUMULATIVE:
            now = 1 / batches.to(tl.float64)
    before = (1 - now).to(compute)
    now = now.to(compute)
    unbiased = (count.to(tl.float64) / (count - 1)).to(compute)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        mask = channel < channels
        mean = tl.load(mean_ptr + channel, mask=mask, other=0)
        var = tl.load(var_ptr + channel, mask=mask, other=0) * unbiased
        running_mean = tl.load(running_mean_ptr + channel, mask=mask, other=0)
        running_var = tl.load(running_var_ptr + channel, mask=mask, other=0)
        tl.store(running_mean_ptr + channel, now * mean + before * running_mean, mask=mask)
        tl.store(running_var_ptr + channel, now * var + before * running_var, mask=mask)


def batch_norm_update_(
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    running_mean: Tensor,  # [C]
    running_var: Tensor,  # [C]
    num_batches_tracked: Tensor | None,  # 0-d int64
    count: int,
    momentum: float | None,
) -> None:
    """See ``fst_fast.ops.reference.batch_norm_update``."""
    with torch.cuda.device_of(mean):
        batch_norm_update_kernel[(1,)](
            mean,
            var,
            running_mean,
            running_var,
            # An absent counter is never read; any pointer stands in for it.
            mean if num_batches_tracked is None else num_batches_tracked,
            len(mean),
            count,
            MOMENTUM=0.0 if momentum is None else momentum,
            COUNTS=num_batches_tracked is not None,
            CUMULATIVE=momentum is None,
            BLOCK=1024,
            enable_fp_fusion=False,
        )
