"""What :func:`fst_fast.purify` returns, and how it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from . import checkpoint
from .heads import unwrap
from .progress import EpochRecord


@dataclass(frozen=True)
class HeadShift:
    """How far the head moved from the compromised one.

    Attributes:
        cosine: between the final and the original weight; 1 is unmoved, -1 is opposite.
        norm: Frobenius norm of the final weight.
        original_norm: Frobenius norm of the original weight.
        class_cosines: the cosine of each class's row alone; 0 for a row of zeros.
        class_norms: Euclidean norm of each class's row.
        class_original_norms: the same of the original weight.
    """

    cosine: float
    norm: float
    original_norm: float
    class_cosines: tuple[float, ...] = ()
    class_norms: tuple[float, ...] = ()
    class_original_norms: tuple[float, ...] = ()


@dataclass(frozen=True)
class PurifyResult:
    """What :func:`purify` returns.

    Attributes:
        model: the tuned model, in eval mode: a copy without wrappers, or with ``inplace=True``
            the model that was given.
        history: one record per finished epoch.
        seconds: of wall time, tuning and validation included.
        settings: every setting as it was resolved, as plain JSON values.
        head_shift: how far the head moved.
        stopped: None for a whole run; else why it ended early.
    """

    model: nn.Module
    history: tuple[EpochRecord, ...]
    seconds: float
    settings: Mapping[str, object]
    head_shift: HeadShift
    stopped: str | None

    def save(self, path: str | Path, **facts: object) -> dict[str, object]:
        """Write the weights as safetensors, and beside them a JSON manifest; both atomically.

        Args:
            path: must end in ``.safetensors``; the manifest takes the same name with ``.json``.
            facts: further entries of the manifest, such as the SHA-256 of the suspect file.
        Returns:
            The manifest as written.
        """
        manifest = {
            "settings": dict(self.settings),
            "history": [asdict(record) for record in self.history],
            "head_shift": asdict(self.head_shift),
            "seconds": self.seconds,
            "stopped": self.stopped,
            "attack_success": "not measured",
            **facts,
        }
        return checkpoint.save(path, unwrap(self.model), manifest)
