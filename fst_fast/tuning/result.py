"""The result of :func:`fst_fast.purify`, which can be saved and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoints
from ..checkpoints.atomic_files import strict_json
from ..data.batches import Loader
from ..heads.find import unwrap
from ..measure import report
from ..measure.per_image import examine
from ..triggers import Trigger
from ..triggers.pixels import Normalization
from .progress import EpochRecord


@dataclass(frozen=True)
class HeadShift:
    """The distance between the tuned head and the compromised one.

    Attributes:
        cosine: between the final and the original weight; 1 is unmoved, -1 is opposite.
        norm: Frobenius norm of the final weight.
        original_norm: Frobenius norm of the original weight.
        class_cosines: the cosine of each class's row alone; 0 for a row of zeros.
        class_norms: Euclidean norm of each class's row.
        class_original_norms: the same of the original weight.

    Example:
        >>> shift = fst_fast.HeadShift(cosine=-0.5, norm=2.0, original_norm=2.0)
        >>> f"cosine {shift.cosine}"
        'cosine -0.5'
    """

    cosine: float
    norm: float
    original_norm: float
    class_cosines: tuple[float, ...] = ()
    class_norms: tuple[float, ...] = ()
    class_original_norms: tuple[float, ...] = ()


@dataclass(frozen=True)
class PurifyResult:
    """The result of :func:`purify`.

    Attributes:
        model: the tuned model, in eval mode: a copy without wrappers, or with ``inplace=True``
            the model that was given.
        history: one record per finished epoch.
        seconds: of wall time, tuning and validation included.
        settings: every setting as it was resolved, as plain JSON values.
        head_shift: how far the head moved.
        stopped: None for a whole run; else why it ended early.
        findings: what the method found out about the suspect; of the default, the triggers that
            were searched on it: their form, target class, size, and success in 0..1 before and
            after tuning. Nothing found does not make a model clean.
        before: the suspect's clean accuracy, in 0..1.
        after: the tuned model's, on the same images.
        measured_on: which these were: "validation images" where ``validation`` was given, else
            "tuning images" (or the first batch of them, where the loader tells no length), on which
            a tuned model looks better than on new ones.
        warnings: more than three points of clean accuracy were lost, or the labels do not seem to
            be the suspect's.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images = torch.rand(4, 3, 2, 2)
        >>> batches = [(images, model(images).argmax(1))]
        >>> result = fst_fast.purify(model, batches, epochs=1, alpha=0.1, progress=False)
        >>> result.settings["alpha"], result.stopped
        (0.1, None)
    """

    model: nn.Module
    history: tuple[EpochRecord, ...]
    seconds: float
    settings: Mapping[str, object]
    head_shift: HeadShift
    stopped: str | None
    before: float
    after: float
    measured_on: str
    warnings: tuple[str, ...] = ()
    findings: tuple[Mapping[str, Any], ...] = ()

    def save(self, path: str | Path, **facts: object) -> dict[str, object]:
        """Write the weights as safetensors, and beside them a JSON manifest; both atomically.

        Args:
            path: must end in ``.safetensors``; the manifest takes the same name with ``.json``.
            facts: further entries of the manifest, such as the SHA-256 of the suspect file.
        Returns:
            The manifest as written.
        """
        return checkpoints.save(path, unwrap(self.model), self.manifest(**facts))

    def report(
        self,
        path: str | Path,
        *,
        test: Loader | None = None,
        suspect: nn.Module | None = None,
        trigger: Trigger | None = None,
        target: int = 0,
        classes: Sequence[str] | None = None,
        normalize: Normalization | None = None,
        device: torch.device | str | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """Write one self-contained HTML page: what was done, what it shows and what it does not.

        Without ``test`` the page holds what the run itself recorded, and says what was not
        measured.

        Args:
            path: ends in ``.html``; an existing file is replaced, atomically.
            test: clean test images, as for :func:`fst_fast.evaluate`; iterated up to three times.
            suspect: the model before the run, for a comparison; ``inplace=True`` needs a copy.
            trigger: measures attack success as well.
            target: the attacker's class.
            classes: a name for each class in order.
            normalize, device: as for :func:`fst_fast.evaluate`.
            facts: further entries of the manifest, such as what :meth:`save` returned.
        Raises:
            ValueError: an argument is not as described.
            RuntimeError: matplotlib is not installed.
        """
        report.check(path)
        if test is None and (suspect is not None or trigger is not None):
            raise ValueError(
                "report: test must be given with suspect or trigger, got None; pass clean test "
                "images, or leave the others out"
            )
        versions = {"versions": checkpoints.versions()}
        manifest = strict_json({**versions, **self.manifest(**(facts or {}))}, "facts")
        measured = None
        if test is not None:
            measured = examine(
                self.model,
                test,
                suspect=suspect,
                trigger=trigger,
                target=target,
                normalize=normalize,
                device=device,
            )
        report.write(path, manifest, measured, classes)

    def manifest(self, **facts: object) -> dict[str, object]:
        """Return what :meth:`save` writes of the run, beside the versions and the file's hash."""
        return {
            "settings": dict(self.settings),
            "history": [asdict(record) for record in self.history],
            "head_shift": asdict(self.head_shift),
            "seconds": self.seconds,
            "stopped": self.stopped,
            "findings": [dict(found) for found in self.findings],
            "clean_accuracy": {
                "before": self.before,
                "after": self.after,
                "measured_on": self.measured_on,
            },
            "warnings": list(self.warnings),
            "attack_success": "not measured",
            **facts,
        }
