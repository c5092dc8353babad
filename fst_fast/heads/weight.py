"""What the loss and the projection both ask of a head's weight."""

import math
import sys
import warnings

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..ops.dtypes import compute_dtype
from .evidence import is_pointwise


def checked_weight(name: str, head: object) -> Tensor:
    """The head's weight, if it is one plain matrix; ``name`` is who asks."""
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{name}: head must be a module, got {type(head).__name__}; use "
            "fst_fast.heads.find_head(model)"
        )
    if not is_pointwise(head):
        raise ValueError(
            f"{name}: head must be the layer that makes the logits, a Linear or 1x1 Conv2d, got "
            f"{type(head).__name__}; use fst_fast.heads.find_head(model)"
        )
    weight = head._parameters.get("weight")
    if weight is None or parametrize.is_parametrized(head):
        raise ValueError(
            f"{name}: head must have a plain weight, got one that is parametrised (weight_norm, "
            "spectral_norm, pruning, ...); remove the parametrisation first"
        )
    if is_lazy(weight):
        raise ValueError(
            f"{name}: head must have a weight, got a lazy layer; run one batch through the model "
            "first"
        )
    if is_sharded(weight) or weight.dim() != (2 if isinstance(head, nn.Linear) else 4):
        raise ValueError(
            f"{name}: head must hold its whole weight, got a part of it, {type(weight).__name__} "
            f"{list(weight.shape)}; leave the head out of FSDP and tensor parallelism"
        )
    if not weight.is_floating_point() or len(weight) < 2 or weight.numel() == 0:
        raise ValueError(
            f"{name}: head must have a floating weight [K, D] with K >= 2 and D >= 1, got "
            f"{weight.dtype} {list(weight.shape)}; pass the layer that makes the logits"
        )
    return weight


def is_sharded(weight: Tensor) -> bool:
    """A DTensor, as FSDP2 and tensor parallelism make; without importing what they need."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(weight, dtensor)


def frobenius_norm(weight: Tensor) -> Tensor:
    """0-d, added up in float64 where the device has it."""
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    # Rows first, in float32: a third of the time, and short sums lose next to nothing.
    rows = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1, dtype=compute_dtype(weight))
    return torch.linalg.vector_norm(rows, dtype=exact)


def looks_fresh(weight: Tensor) -> bool:
    """Whether ``weight`` could be nn.Linear's own draw, U(-1/sqrt(D), 1/sqrt(D)). Waits."""
    K, D = weight.shape[:2]
    bound = (1 + torch.finfo(weight.dtype).eps) / math.sqrt(D)
    expected = math.sqrt(K / 3)
    # Three standard deviations of the norm of K * D uniform draws.
    slack = 3 * 0.45 / math.sqrt(K * D)
    close = abs(frobenius_norm(weight).item() / expected - 1) <= slack
    return close and weight.detach().abs().max().item() <= bound


def warn_fresh(what: str, remedy: str) -> None:
    warnings.warn(
        f"{what} looks freshly initialised, not trained, so its norm is not that of the suspect "
        f"head; {remedy}, and load the checkpoint before that",
        stacklevel=3,
    )
