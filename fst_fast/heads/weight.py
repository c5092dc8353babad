"""Defines a head, checks it, and answers questions about its weight."""

import math
import sys
import warnings
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..ops.dtypes import compute_dtype


def is_pointwise(module: nn.Module) -> bool:
    """A Linear, or a 1x1 Conv2d with one group and no padding: a matrix [K, D] on features [D]."""
    if isinstance(module, nn.Conv2d):
        plain = module.kernel_size == (1, 1) and module.groups == 1
        return plain and module.padding in ((0, 0), "valid", "same")
    return isinstance(module, nn.Linear)


def checked_weight(
    where: str,
    head: object,
    label: str = "",
    instead: str = "use fst_fast.heads.find_head(model)",
) -> Tensor:
    """The head's weight, if the head is a Linear or 1x1 Conv2d with a whole, plain matrix.

    Args:
        where: who asks, to begin errors with.
        label: what errors call the head; its class where empty.
        instead: the remedy, where another layer may do.
    """
    label = label or type(head).__name__
    if not isinstance(head, nn.Module):
        raise ValueError(f"{where}: head must be a module, got {label}; {instead}")
    if not is_pointwise(head):
        raise ValueError(
            f"{where}: head must make the logits, with groups=1 and no padding: a Linear or 1x1 "
            f"Conv2d, got {label}; {instead}"
        )
    weight = head._parameters.get("weight")
    if weight is None or parametrize.is_parametrized(head):
        raise ValueError(
            f"{where}: head must have a plain weight, got {label}, which is parametrised "
            "(weight_norm, spectral_norm, pruning, ...); remove the parametrisation first, or "
            f"{instead}"
        )
    if is_lazy(weight):
        raise not_ready(where, label)
    _check_matrix(where, head, weight, label, instead)
    return weight


def _check_matrix(where: str, head: nn.Module, weight: Tensor, label: str, instead: str) -> None:
    if is_sharded(weight) or weight.dim() != (2 if isinstance(head, nn.Linear) else 4):
        raise ValueError(
            f"{where}: head must hold its whole weight, got a part of it, {type(weight).__name__} "
            f"{list(weight.shape)}; leave the head out of FSDP and tensor parallelism"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"{where}: the weight of the head must be floating, got {weight.dtype} in {label}; "
            f"dequantise it first, or {instead}"
        )
    K, D = weight.shape[:2]
    if K < 2 or D < 1:
        raise ValueError(
            f"{where}: head must have K >= 2 outputs and D >= 1 features, got K = {K} and D = {D} "
            f"in {label}; use one output per class, or {instead}"
        )


def not_ready(where: str, label: str) -> ValueError:
    return ValueError(
        f"{where}: head must have a weight, got {label}, a lazy layer; run one batch through the "
        "model first (head= cannot help before that)"
    )


def head_shape(head: nn.Module) -> tuple[int, int]:
    """(K, D): classes and features of a Linear or 1x1 Conv2d.

    Example:
        >>> fst_fast.heads.head_shape(torch.nn.Conv2d(8, 3, kernel_size=1))
        (3, 8)
    """
    K, D = _weight(head).shape[:2]
    return K, D


def head_matrix(head: nn.Module) -> Tensor:
    """The weight as [K, D], a differentiable view that shares its storage, whatever its strides.

    Example:
        >>> fst_fast.heads.head_matrix(torch.nn.Conv2d(8, 3, kernel_size=1)).shape
        torch.Size([3, 8])
    """
    return _weight(head).view(head_shape(head))


def _weight(head: nn.Module) -> Tensor:
    if not is_pointwise(head):
        raise ValueError(f"heads: head must be a Linear or a 1x1 Conv2d, got {layer_words(head)}")
    return cast(Tensor, head.weight)


def layer_words(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__} {module.in_features}->{module.out_features}"
    if isinstance(module, nn.Conv2d):
        sides = "x".join(map(str, module.kernel_size))
        return f"{type(module).__name__} {sides} {module.in_channels}->{module.out_channels}"
    return type(module).__name__


def sharers(root: nn.Module, head: nn.Module) -> Iterator[str]:
    """The other parameters and buffers that are, or overlap in memory with, the head's own."""
    mine = [(name, p) for name, p in head._parameters.items() if p is not None]
    storages = {_storage(parameter) for _, parameter in mine} - {None}
    for path, module in root.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or _storage(tensor) not in storages:
                continue
            for own, parameter in mine:
                if not (module is head and name == own) and _overlap(tensor, parameter):
                    yield f"{own} with '{f'{path}.{name}'.lstrip('.')}'"


def _storage(tensor: Tensor) -> int | None:
    """Return what two tensors that overlap have in common; None if one has no such memory."""
    if tensor.layout != torch.strided or is_lazy(tensor):
        return None
    return tensor.untyped_storage()._cdata


def _overlap(a: Tensor, b: Tensor) -> bool:
    if _storage(a) != _storage(b) or 0 in (a.numel(), b.numel()):
        return False
    (a_start, a_end), (b_start, b_end) = _span(a), _span(b)
    return a_start < b_end and b_start < a_end


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and past-the-end byte within the storage."""
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + int(extent) * tensor.element_size()


def is_sharded(weight: Tensor) -> bool:
    """A DTensor, as FSDP2 and tensor parallelism make; without importing what they need."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(weight, dtensor)


def frobenius_norm(weight: Tensor) -> Tensor:
    """0-d, added up in float64 where the device has it."""
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    # Rows are summed first, in float32: that takes a third of the time and loses next to nothing.
    rows = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1, dtype=compute_dtype(weight))
    return torch.linalg.vector_norm(rows, dtype=exact)


def looks_fresh(weight: Tensor) -> bool:
    """Return whether ``weight`` could be nn.Linear's own draw, U(-1/sqrt(D), 1/sqrt(D)). Waits."""
    K, D = weight.shape[:2]
    bound = (1 + torch.finfo(weight.dtype).eps) / math.sqrt(D)
    expected = math.sqrt(K / 3)
    # The bound is three standard deviations of the norm of K * D uniform draws.
    slack = 3 * 0.45 / math.sqrt(K * D)
    close = abs(frobenius_norm(weight).item() / expected - 1) <= slack
    return close and weight.detach().abs().max().item() <= bound


def warn_fresh(what: str, remedy: str) -> None:
    warnings.warn(
        f"{what} looks freshly initialised, not trained, so its norm is not that of the suspect "
        f"head; {remedy}, and load the checkpoint before that",
        stacklevel=3,
    )
