"""In plain words: what a report shows, and what it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .manifest import Manifest
from .measured import Measured, Observed
from .text import SPACE, clean, count, interval, number, percent

# Rates of fewer images than this are coarse.
FEW = 20


@dataclass(frozen=True)
class Attack:
    """One model's answers to triggered images of other classes, counted.

    Attributes:
        images: triggered images of other classes.
        taken: those taken for the target.
        robust: those still classified as their label.
    """

    images: int
    taken: int
    robust: int

    @property
    def success(self) -> float:
        """Attack success in 0..1."""
        return self.taken / self.images

    @property
    def robustness(self) -> float:
        """Robust accuracy in 0..1."""
        return self.robust / self.images


def attack_of(observed: Observed | None, target: int) -> Attack | None:
    """None where no trigger was given, or no image of another class came."""
    if observed is None or observed.triggered is None:
        return None
    others = observed.labels != target
    answers, labels = observed.triggered[others], observed.labels[others]
    images = int(others.sum())
    if images == 0:
        return None
    return Attack(images, int((answers == target).sum()), int((answers == labels).sum()))


def accuracy_of(observed: Observed | None) -> float | None:
    """Share of the images classified as their label."""
    return None if observed is None else float((observed.clean == observed.labels).mean())


def shown(manifest: Manifest, measured: Measured | None, names: Sequence[str]) -> list[str]:
    """Say what was measured, a sentence each."""
    found = []
    if measured is not None:
        before, after = accuracy_of(measured.before), accuracy_of(measured.after)
        was = "" if before is None else f"; the suspect model did so for {percent(before)}"
        found.append(
            f"The purified model classifies {percent(after)} of "
            f"{count(len(measured.after.labels))} test images as their label{was}."
        )
        found += _attack_shown(measured, names)
    elif manifest.accuracy is not None:
        before, after, source = manifest.accuracy
        found.append(
            f"Clean accuracy was {percent(before)} before and {percent(after)} after the run, "
            f"measured on: {clean(source)}."
        )
    elif manifest.history:
        where = "held-out" if manifest.settings.get("validation") else "tuning"
        last = manifest.history[-1]["clean_accuracy"]
        found.append(f"In the last epoch, {percent(last)} of the {where} images were right.")
    if manifest.head.cosine is not None:
        found.append(
            "The cosine between the head's weight and the weight it came with is now "
            f"{number(manifest.head.cosine)}; 1 is unmoved, {number(-1, 0)} is opposite."
        )
    return found


def _attack_shown(measured: Measured, names: Sequence[str]) -> list[str]:
    before = attack_of(measured.before, measured.target)
    after = attack_of(measured.after, measured.target)
    if after is None or measured.trigger is None:
        return []
    low, high = interval(after.taken, after.images)
    kind, target = clean(measured.trigger.get("name")), names[measured.target]
    was = "" if before is None else f"; the suspect model's was {percent(before.success)}"
    return [
        f"With the {kind} trigger on, it takes {count(after.taken)} of {count(after.images)} "
        f"images of other classes for the target class {target}: attack success "
        f"{percent(after.success)} (95{SPACE}% interval {percent(low)} to {percent(high)}){was}.",
        f"Of the same triggered images the purified model classifies "
        f"{percent(after.robustness)} as their label (robust accuracy).",
    ]


def not_shown(manifest: Manifest, measured: Measured | None) -> list[str]:
    """Say what must not be concluded, a sentence or two each."""
    found = []
    if measured is None or measured.trigger is None:
        found.append(
            "Attack success was not measured: no trigger was given. Nothing here tells whether "
            "the model had a backdoor, or has one now."
        )
    elif attack_of(measured.after, measured.target) is None:
        found.append("Attack success was not measured: no image of another class was given.")
    else:
        found.append(
            "One trigger, with the settings below and one target class, was tried. Another "
            "pattern, place, strength or target may still succeed."
        )
    if measured is None:
        found.append("Classes were not measured one by one: no test images were given.")
        if manifest.accuracy is None or manifest.accuracy[2] == "tuning images":
            found.append(
                "Accuracy on the images that a model was tuned on is higher than on new images."
            )
    else:
        if measured.before is None:
            found.append("The suspect model was not measured: it was not given.")
        if _coarse(measured):
            found.append(
                f"Some classes have fewer than {FEW} test images: their own rates are coarse."
            )
    found += [
        "How far a row of the head has turned is a hint at best: the target class often stands "
        "out, but so do others, and a turned head is no proof that a backdoor is gone.",
        "A purified model can learn a backdoor again quickly when it is tuned further on poisoned "
        "data (arXiv 2410.09838). Treat it as untrusted input to any further training.",
    ]
    return found


def _coarse(measured: Measured) -> bool:
    return int(np.unique(measured.after.labels, return_counts=True)[1].min()) < FEW
