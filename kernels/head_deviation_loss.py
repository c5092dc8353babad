"""Cross-entropy of a linear head plus its deviation penalty, with all gradients, in Triton."""

import torch
from torch import Tensor

from .head_deviation_large import run_large
from .head_deviation_parts import Output, Problem
from .head_deviation_small import is_small, run_small


@torch.no_grad()
def head_deviation_loss(
    features: Tensor,  # [B, D]
    weight: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    labels: Tensor,  # [B]
    weight0: Tensor | None,  # [K, D]
    class_weight: Tensor | None,  # [K]
    row_grad: Tensor | None,  # [B]
    weight_scale: Tensor | None,
    alpha_scale: Tensor | None,
    alpha: float,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``fst_fast.ops.head_deviation_loss``."""
    if alpha == 0 and alpha_scale is None:
        weight0 = None
    wanted = (output_mask[0], output_mask[1], output_mask[2])
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    problem = Problem(
        features.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        labels.contiguous(),
        None if weight0 is None else weight0.contiguous(),
        None if class_weight is None else class_weight.contiguous(),
        None if row_grad is None else row_grad.contiguous(),
        weight_scale,
        alpha_scale,
        alpha,
        reduction,
        label_smoothing,
        ignore_index,
        wanted,
        compute,
        _allocate(features, weight, labels, compute, reduction, wanted),
    )
    with torch.cuda.device_of(features):
        run = run_small if is_small(*problem.sizes) else run_large
        run(problem)
    return tuple(problem.output)  # type: ignore[return-value]


def _allocate(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    compute: torch.dtype,
    reduction: str,
    wanted: tuple[bool, bool, bool],
) -> Output:
    shape = (len(features),) if reduction == "none" else ()
    return Output(
        features.new_empty(shape, dtype=compute),
        features.new_empty(shape, dtype=compute),
        features.new_empty((), dtype=compute),
        labels.new_empty(()),
        labels.new_empty(()),
        features.new_empty(features.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty(len(weight) if wanted[2] else 0),
    )
