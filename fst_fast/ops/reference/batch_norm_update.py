"""Running statistics of batch norm, in plain PyTorch."""

from torch import Tensor


def batch_norm_update_(
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    running_mean: Tensor,  # [C]
    running_var: Tensor,  # [C]
    num_batches_tracked: Tensor | None,  # 0-d int64
    count: int,
    momentum: float | None,
) -> None:
    """Move running statistics towards a batch's, in place; see ``fst_fast.ops.batch_norm_act``."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    share: float | Tensor
    if momentum is None:
        assert num_batches_tracked is not None
        share = 1 / num_batches_tracked.double()
    else:
        share = momentum
    unbiased = var * (count / (count - 1))
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(share * new + (1 - share) * running)
