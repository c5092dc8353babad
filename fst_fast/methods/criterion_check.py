"""Checks the arguments of HeadDeviationLoss, in words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..triggers.plain_numbers import plain_number

NAME = "HeadDeviationLoss"


def is_recorded(values: Tensor) -> bool:
    """Return whether torch.compile or a CUDA graph is recording: no value may be read then."""
    if torch.compiler.is_compiling():
        return True
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def check_ddp(model: object) -> None:
    """Refuse what makes DDP lose the gradients of a head that its forward does not use."""
    while isinstance(model, nn.Module):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            wrong = [n for n in ("static_graph", "find_unused_parameters") if getattr(model, n)]
            if wrong:
                raise ValueError(
                    f"{NAME}: features_of needs DDP without {' and '.join(wrong)}, or the ranks' "
                    "heads would drift apart; leave it out, or use "
                    "criterion.from_logits(model(images), labels)"
                )
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)


def checked_smoothing(label_smoothing: object) -> float:
    """The smoothing as a float; its range is the op's to check."""
    found = plain_number(label_smoothing)
    if found is None:
        raise ValueError(f"{NAME}: label_smoothing must be a number, got {label_smoothing!r}")
    return float(found)


def checked_class_weight(
    class_weight: Tensor | None, weight: Tensor, compute: torch.dtype
) -> Tensor | None:
    """[K] in the compute dtype on the weight's device, or None; raises ValueError for others."""
    if class_weight is None:
        return None
    if not isinstance(class_weight, Tensor):
        raise ValueError(
            f"{NAME}: class_weight must be a tensor [{len(weight)}], got "
            f"{type(class_weight).__name__}; use torch.tensor(...)"
        )
    if class_weight.shape != weight.shape[:1] or not class_weight.is_floating_point():
        raise ValueError(
            f"{NAME}: class_weight must be [{len(weight)}] and floating, got "
            f"{list(class_weight.shape)} {class_weight.dtype}"
        )
    return class_weight.detach().to(weight.device, compute)
