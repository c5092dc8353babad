"""The numbers of each class, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .manifest import Manifest
from .measured import Measured, Observed
from .text import clean

# A matrix of so many classes still fits a screen; more become a list of the commonest confusions.
MATRIX = 20
COMMONEST = 20


@dataclass(frozen=True)
class Rates:
    """One model's rates on the images of one class; None where one was not measured.

    Attributes:
        accuracy: share of the images classified as the class.
        taken: share of the triggered images classified as the target; None for the target's own.
    """

    accuracy: float | None
    taken: float | None


@dataclass(frozen=True)
class ClassRow:
    """One class.

    Attributes:
        number, name: of the class.
        images: how many of it were in the test set.
        before, after: what the models do with them.
        cosine, norm_ratio: of its row of the head's weight with the original row.
    """

    number: int
    name: str
    images: int
    before: Rates
    after: Rates
    cosine: float | None
    norm_ratio: float | None

    @property
    def change(self) -> float | None:
        """The change of the accuracy."""
        return difference(self.before.accuracy, self.after.accuracy)


def difference(before: float | None, after: float | None) -> float | None:
    """after - before, where both are known."""
    return None if before is None or after is None else after - before


def names_of(
    manifest: Manifest, measured: Measured | None, given: Sequence[str] | None
) -> list[str]:
    """One name for each class, as given; else the manifest's; else numbers.

    Raises:
        ValueError: not one name for each class.
    """
    known = len(manifest.head.class_cosines)
    seen = 1 + max((_highest(o) for o in _observations(measured)), default=-1)
    if known and seen > known:
        raise ValueError(
            f"report: test must hold classes in 0..{known - 1} like the run's head, got "
            f"{seen - 1}; check that the manifest and the models belong together"
        )
    total = known or max(seen, len(given or manifest.classes))
    if given is not None and len(given) != total:
        raise ValueError(
            f"report: classes must name each of the {total} classes in order, got {len(given)}"
        )
    names = list(given or manifest.classes)
    return [clean(n, 60) for n in names] if len(names) == total else list(map(str, range(total)))


def _observations(measured: Measured | None) -> list[Observed]:
    if measured is None:
        return []
    return [o for o in (measured.before, measured.after) if o is not None]


def _highest(observed: Observed) -> int:
    parts = (observed.labels, observed.clean, observed.triggered)
    return max(int(part.max()) for part in parts if part is not None)


def rows_of(manifest: Manifest, measured: Measured | None, names: Sequence[str]) -> list[ClassRow]:
    """A row for each class."""
    total = len(names)
    before = _rates(measured.before if measured else None, measured, total)
    after = _rates(measured.after if measured else None, measured, total)
    images = [0] * total
    if measured is not None:
        images = np.bincount(measured.after.labels, minlength=total).tolist()
    head = manifest.head
    shifts: list[tuple[float | None, float | None]] = [(None, None)] * total
    if head.class_cosines:
        triples = zip(head.class_cosines, head.class_norms, head.class_original_norms, strict=True)
        shifts = [(cosine, n / n0 if n is not None and n0 else None) for cosine, n, n0 in triples]
    return [ClassRow(k, names[k], images[k], before[k], after[k], *shifts[k]) for k in range(total)]


def _rates(observed: Observed | None, measured: Measured | None, total: int) -> list[Rates]:
    if observed is None or measured is None:
        return [Rates(None, None)] * total
    labels = observed.labels
    images = np.bincount(labels, minlength=total)
    right = np.bincount(labels[observed.clean == labels], minlength=total)
    taken = None
    if observed.triggered is not None:
        taken = np.bincount(labels[observed.triggered == measured.target], minlength=total)
    return [
        Rates(
            accuracy=right[k].item() / images[k].item() if images[k] else None,
            taken=taken[k].item() / images[k].item()
            if taken is not None and images[k] and k != measured.target
            else None,
        )
        for k in range(total)
    ]


def matrix(observed: Observed, total: int) -> np.ndarray:
    """[total, total] int64: images of each class (rows) classified as each class (columns)."""
    pairs = observed.labels * total + observed.clean
    return np.bincount(pairs, minlength=total * total).reshape(total, total)


def commonest(observed: Observed) -> list[tuple[int, int, int]]:
    """The commonest confusions on the images as they are: (class, taken for, images)."""
    wrong = observed.labels != observed.clean
    pairs = np.stack([observed.labels[wrong], observed.clean[wrong]])
    found, counts = np.unique(pairs, axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:COMMONEST]
    return [(*found[:, i].tolist(), counts[i].item()) for i in order]


def most(
    rows: Sequence[ClassRow], key: Callable[[ClassRow], float | None], limit: int, keep: int | None
) -> list[ClassRow]:
    """At most ``limit`` rows, those of the least key and the class ``keep``, in order."""
    if len(rows) <= limit:
        return list(rows)

    def rank(row: ClassRow) -> tuple[bool, float]:
        value = key(row)
        return row.number != keep, float("inf") if value is None else value

    return sorted(sorted(rows, key=rank)[:limit], key=lambda row: row.number)
