"""Judges by a model's answers whether labels can be its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A model is better than guessing from this share of what guessing leaves.
_ABOVE_CHANCE = 0.1
# At least this share of a label's images must have one answer for that to be its class.
_AGREES = 0.4
# A label of so many images or more, of which such a share has one other answer, is another class.
_FEWEST, _SURELY = 5, 0.7
_SHOWN = 5


def labels_fault(
    labels: Tensor, answered: Tensor, classes: int, names: Sequence[str] | None = None
) -> str | None:
    """Say why these labels cannot be the model's, and show the confusion; None if they can.

    Either the model is hardly better than guessing; or most labels have one answer that is another
    class; or two labels or more surely have.

    Args:
        labels: [N] int64 on the CPU.
        answered: [N] int64, the model's classes for the images as they are.
        classes: of the model.
        names: of the classes, for the text.
    """
    present, group, sizes = labels.unique(return_inverse=True, return_counts=True)
    right = torch.bincount(group[labels == answered], minlength=len(present))
    recall = float((right / sizes).mean())
    guessed = 1 / (len(present) if len(present) > 1 else max(2, classes))
    pairs, counts = torch.stack([labels, answered]).unique(dim=1, return_counts=True)
    if recall > guessed + _ABOVE_CHANCE * (1 - guessed):
        agreeing = _agreement(pairs, counts, present, sizes)
        of_label = sizes[torch.searchsorted(present, pairs[0].contiguous())]
        surely = (pairs[0] != pairs[1]) & (of_label >= _FEWEST) & (counts >= _SURELY * of_label)
        if int(surely.sum()) < 2 and (agreeing < _AGREES or recall > agreeing / 2):
            return None
    told = f"a model that is right on {100 * recall:.1f} % of each class's images"
    return told + _confused(pairs, counts, labels, names)


def _agreement(pairs: Tensor, counts: Tensor, present: Tensor, sizes: Tensor) -> float:
    """Return how often another image of a label is answered as the label mostly is."""
    most = torch.zeros_like(sizes).scatter_reduce(
        0, torch.searchsorted(present, pairs[0].contiguous()), counts, "amax"
    )
    return float((most - 1).sum() / (sizes - 1).sum().clamp(min=1))


def _confused(pairs: Tensor, counts: Tensor, labels: Tensor, names: Sequence[str] | None) -> str:
    """The commonest wrong answers, in words."""
    wrong = torch.nonzero(pairs[0] != pairs[1]).flatten()
    first = wrong[counts[wrong].argsort(descending=True, stable=True)][:_SHOWN].tolist()
    told = []
    for at in first:
        label, answer = pairs[:, at].tolist()
        total = int((labels == label).sum())
        told.append(
            f"{_named(label, names)} for {_named(answer, names)} ({int(counts[at])} of {total})"
        )
    return f", and takes {', '.join(told)}" if told else ""


def _named(number: int, names: Sequence[str] | None) -> str:
    if names is None or number >= len(names) or names[number] == str(number):
        return str(number)
    name = names[number]
    return f"{number} {name if name.isprintable() else ascii(name)!r}"
