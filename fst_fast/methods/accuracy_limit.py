"""Takes a change of a model as far as its clean accuracy allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from .base import Run

Change = TypeVar("Change")


def largest_allowed(
    run: Run,
    nothing: Change,
    changes: Iterable[Change],
    put: Callable[[Change], None],
    most_lost: float,
) -> Change:
    """Put the largest change into the model that its clean accuracy allows, and return it.

    Changes are tried in their order, up to the first that costs too much. No attack is asked for.

    Args:
        run: its model, as it is when this is called, has the accuracy to compare with.
        nothing: the change that leaves the model so.
        changes: from the smallest to the largest.
        put: makes the model what it is under a change.
        most_lost: accuracy on clean images that a change may cost, in 0..1.
    """
    least, kept = run.clean_accuracy() - most_lost, nothing
    for change in changes:
        put(change)
        if run.clean_accuracy() < least:
            break
        kept = change
    put(kept)
    return kept
