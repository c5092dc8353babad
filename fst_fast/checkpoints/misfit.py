"""Compares the tensors of a file with those of a model, and says what keeps them apart."""

from __future__ import annotations

import torch
from torch import Tensor

from fst_fast.checkpoints.read import FLOATS, few


def compare(
    own: dict[str, Tensor], state: dict[str, Tensor], num_classes: int | None
) -> tuple[list[str], str]:
    """List what keeps state out of own; and a hint, where only the number of classes differs."""
    shared = [name for name in own if name in state]
    filled = {id(own[name]) for name in shared}
    missing = [
        name
        for name, value in own.items()
        if name not in state
        and id(value) not in filled
        and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in state if name not in own]
    differ = [name for name in shared if own[name].shape != state[name].shape]
    shapes = [f"{n}: model {list(own[n].shape)}, file {list(state[n].shape)}" for n in differ]
    kinds = [
        f"{n}: model {own[n].dtype}, file {state[n].dtype}"
        for n in shared
        if own[n].dtype != state[n].dtype and not {own[n].dtype, state[n].dtype} <= set(FLOATS)
    ]
    problems = [
        f"{len(found)} {what} ({few(found)})"
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of another kind", kinds),
            ("unequal though tied", _untied(own, state, shared)),
        )
        if found
    ]
    if len(problems) > 1 or not shapes:
        return problems, _prefix_hint(own, state)
    return problems, _head_hint([(own[n], state[n]) for n in differ], num_classes)


def _prefix_hint(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Tell that the file has all of the model's names behind a prefix, as of averaged weights."""
    first = next(iter(own), "")
    prefixes = [name.removesuffix(first) for name in state if name.endswith(f".{first}")]
    found = [p for p in prefixes if all(f"{p}{name}" in state for name in own)]
    if not found:
        return ""
    return (
        f"the file has these weights behind {few(map(repr, found))}: save those that you mean, "
        "without it: torch.save({n.removeprefix(prefix): v for n, v in state_dict.items() if "
        "n.startswith(prefix)}, 'weights.pt')"
    )


def _untied(own: dict[str, Tensor], state: dict[str, Tensor], shared: list[str]) -> list[str]:
    """Names that the model ties to an earlier name, for which the file holds other values."""
    first: dict[int, str] = {}
    for name in shared:
        first.setdefault(id(own[name]), name)
    leaders = ((name, first[id(own[name])]) for name in shared)
    return [f"{n} and {f}" for n, f in leaders if n != f and not _equal(state[n], state[f])]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _head_hint(pairs: list[tuple[Tensor, Tensor]], num_classes: int | None) -> str:
    counts = {(len(mine), len(file)) for mine, file in pairs if mine.dim() and file.dim()}
    alike = all(mine.shape[1:] == file.shape[1:] for mine, file in pairs)
    if len(counts) != 1 or not alike:
        return ""
    ((built, classes),) = counts
    if num_classes not in (None, built):
        return ""
    return f"the checkpoint has {classes} classes; pass num_classes={classes}"
