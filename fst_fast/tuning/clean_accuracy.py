"""Measures the suspect before a run and the model after it, on the same clean images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..data.batches import Batches
from ..data.device_loader import DeviceLoader
from ..heads.contexts import seeded
from .arguments import lost_note
from .distributed import Ranks
from .distributed_looks import answers_of
from .labels_check import labels_fault
from .profiling import StepProfile
from .resume import generators_of
from .settings import ComputeSettings

_REMEDY = "check=False (in a sweep: force: true) goes on all the same"


@dataclass(frozen=True)
class CleanAccuracy:
    """The clean accuracy before and after a run.

    Attributes:
        before: share of images that the suspect classifies as their label, in 0..1.
        after: the same of the tuned model.
        measured_on: which images these are, in words.
        warnings: of lost accuracy, and of labels that cannot be the suspect's.
    """

    before: float
    after: float
    measured_on: str
    warnings: tuple[str, ...]


class Judge:
    """Measures a suspect, and later what was made of it.

    Args:
        tuning: the tuning batches, whose labels are checked.
        validation: held-out batches to measure on; None measures on the tuning images.
        compute: how the model is computed, settled.
        seed: of whatever the loaders draw meanwhile; all random states are put back.
        ranks: share the images in a data parallel run; else None.
    """

    def __init__(
        self,
        tuning: Batches,
        validation: Batches | None,
        compute: ComputeSettings,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self._tuning, self._validation, self._ranks = tuning, validation, ranks
        self._compute, self._seed = compute, seed
        self._labels_fault: str | None = None
        self._before = 0.0

    @property
    def measured_on(self) -> str:
        """The images that are classified, in words."""
        if self._validation is not None:
            return "validation images"
        return "tuning images" if _has_end(self._tuning) else "first batch of tuning images"

    def look_at(self, suspect: nn.Module, classes: int, check: bool) -> str:
        """Measure the suspect; returns its accuracy in words.

        Args:
            classes: of its head.
            check: refuse labels that cannot be its own, rather than say so in the warnings.
        Raises:
            ValueError: the labels cannot be the suspect's; shows what it takes for what.
        """
        labels, answered = self._answers(suspect, _plain(self._tuning))
        fault = labels_fault(labels, answered, classes)
        if fault is not None:
            self._labels_fault = (
                f"{self._tuning.where} must have the model's own labels, got {fault}; check the "
                "order of the classes, and that images are normalised as in training"
            )
            if check:
                raise ValueError(f"{self._labels_fault}; {_REMEDY}")
        if self._validation is not None:
            labels, answered = self._answers(suspect, self._validation)
        self._before = _share(labels, answered)
        return f"the suspect is right on {100 * self._before:.1f} % of the {self.measured_on}"

    def compare(self, tuned: nn.Module) -> CleanAccuracy:
        """Measure the tuned model on what the suspect was measured on."""
        after = _share(*self._answers(tuned, self._validation or _plain(self._tuning)))
        where = self.measured_on
        told = (self._labels_fault, lost_note(self._before, after, f"the {where}"))
        warnings = tuple(text for text in told if text is not None)
        return CleanAccuracy(self._before, after, where, warnings)

    def _answers(self, model: nn.Module, batches: Batches) -> Tensor:
        """Labels and the model's answers to a pass over the images, [2, N] int64 on the CPU."""
        # A GPU is through with a few thousand images before batch norm is folded.
        fold = self._compute.device.type != "cuda"
        with seeded(self._seed, self._compute.device), _undrawn(batches.loader):
            return answers_of(model, batches, self._compute, self._ranks, fold)


def _has_end(batches: Batches) -> bool:
    """Return whether a pass more comes to an end, and takes nothing away from the run."""
    return batches.adapter.length() is not None and batches.repeats


def _plain(batches: Batches) -> Batches:
    """The tuning images, without augmentation where that is known; else their first batch."""
    loader = batches.loader
    if not _has_end(batches):
        loader = [batches.first]
    elif isinstance(loader, StepProfile):
        # Steps are counted there, and a look at the images is none.
        loader = loader.loader
    if type(loader) is DeviceLoader:
        loader = loader.plain()
    return batches if loader is batches.loader else Batches(loader, 1, batches.where)


@contextmanager
def _undrawn(loader: object) -> Iterator[None]:
    """Put back the states of the generators of its own that a loader draws from."""
    states = [(generator, generator.get_state()) for generator in generators_of(loader)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _share(labels: Tensor, answered: Tensor) -> float:
    return int((labels == answered).sum()) / len(labels)
