"""The result of a trigger search: candidates that can be saved, drawn, and used as triggers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoints
from ..checkpoints import manifest as manifests
from ..checkpoints.atomic_files import replace_file
from ..measure.report.pictures import strip
from ..triggers import AddedPattern, MaskedPattern, Trigger
from .search_candidates import Candidate

_KIND = "fst_fast trigger search"
# The wrong answers have gathered where one class has this share of them, and twice its own.
_GATHERED = 0.5
_TOLD = ("target", "form", "size", "success", "openness", "index", "evidence", "score")


@dataclass(frozen=True)
class SearchResult:
    """The result of :func:`search`.

    Attributes:
        candidates: one for each class and form that was searched, the highest score first.
        evidence: [K], each class's share of the wrong answers while clean images are unlearned.
        notes: what a reader must know of the search, such as that too few images came.
        settings: every setting as it was resolved, as plain JSON values.
        seconds: of wall time.
        samples: [n, H, W, C] uint8, a few images to draw triggers on.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
        >>> batches = [(torch.rand(30, 3, 8, 8), torch.arange(30) % 3)]
        >>> result = fst_fast.search(model, batches, forms=("mask",), progress=False)
        >>> [candidate.form for candidate in result.candidates]
        ['mask', 'mask', 'mask']
    """

    candidates: tuple[Candidate, ...]
    evidence: tuple[float, ...]
    notes: tuple[str, ...]
    settings: Mapping[str, Any]
    seconds: float
    samples: Tensor

    @property
    def found(self) -> tuple[Candidate, ...]:
        """Return the candidates that stand out; none of them does not make a model clean."""
        return tuple(candidate for candidate in self.candidates if candidate.stands_out)

    def __str__(self) -> str:
        see = "; see the notes" if self.notes else ""
        return f"{self._found_text()}{self._evidence_text()}{see}"

    def _found_text(self) -> str:
        if not self.found:
            return f"no door of these kinds was found: {', '.join(self.settings['forms'])}"
        classes = list(dict.fromkeys(candidate.target for candidate in self.found))
        said = "; ".join(
            f"{c.form} of size {c.size:.3f}, success {100 * c.success:.0f} %, score {c.score:.1f}"
            for c in self.found
            if c.target == classes[0]
        )
        more = f"; also found for classes {', '.join(map(str, classes[1:]))}" if classes[1:] else ""
        return f"class {classes[0]} stands out: {said}{more}"

    def _evidence_text(self) -> str:
        """Say where the wrong answers gather, as a door of another form would show there alone."""
        share = max(self.evidence)
        if share < max(_GATHERED, 2 / len(self.evidence)):
            return ""
        return (
            f"; while the model unlearns clean images, {100 * share:.0f} % of its wrong answers "
            f"are class {self.evidence.index(share)}, as with a door whatever its form"
        )

    def triggers(self) -> list[Trigger]:
        """Return the candidates' triggers, in their order.

        They act on stored bytes, as any trigger: ``evaluate(model, loader, trigger, target)``.
        """
        return [candidate.trigger for candidate in self.candidates]

    def save(self, path: str | Path, **facts: object) -> dict[str, object]:
        """Write the triggers as safetensors, and beside them a JSON manifest; both atomically.

        Args:
            path: must end in ``.safetensors``; the manifest takes the same name with ``.json``.
            facts: further entries of the manifest, such as the SHA-256 of the suspect file.
        Returns:
            The manifest as written.
        Raises:
            ValueError: a wrong path or fact.
            OSError: the disk refused.
        """
        tensors = {"samples": self.samples}
        for number, trigger in enumerate(self.triggers()):
            for name in ("mask", "pattern"):
                if hasattr(trigger, name):
                    tensors[f"candidate{number}.{name}"] = getattr(trigger, name)
        return checkpoints.save(path, tensors, self.manifest(**facts))

    def manifest(self, **facts: object) -> dict[str, object]:
        """Return what :meth:`save` writes, beside the tensors, the versions and the hash."""
        return {
            "kind": _KIND,
            "candidates": [row_of(candidate) for candidate in self.candidates],
            "evidence": list(self.evidence),
            "notes": list(self.notes),
            "settings": dict(self.settings),
            "seconds": self.seconds,
            **facts,
        }

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read what :meth:`save` wrote; nothing in the file is run.

        Raises:
            fst_fast.LoadError: the file is damaged, or no file of tensors.
            ValueError: it is no saved search.
        """
        tensors = checkpoints.read_state_dict(path)
        fields = manifests.check(Path(path)).facts or {}
        try:
            if fields["kind"] != _KIND:
                raise KeyError(fields["kind"])
            rows = fields["candidates"]
            return cls(
                candidates=tuple(_candidate(rows[i], i, tensors) for i in range(len(rows))),
                evidence=tuple(float(share) for share in fields["evidence"]),
                notes=tuple(map(str, fields["notes"])),
                settings=dict(fields["settings"]),
                seconds=float(fields.get("seconds", 0.0)),
                samples=tensors["samples"],
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"search: path must be a file that SearchResult.save() wrote, got {path} without "
                f"what belongs there ({error}); for a model use fst_fast.load()"
            ) from None

    def pictures(self, folder: str | Path, most: int = 10) -> list[Path]:
        """Draw the first candidates: rows of an image, the image triggered, and what changed.

        What changed is brightened until the greatest change is visible.

        Args:
            folder: is made where it is missing.
            most: how many candidates are drawn.
        Returns:
            The PNG files, such as ``01-class-2-mask.png``.
        Raises:
            OSError: the disk refused.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for number, candidate in enumerate(self.candidates[:most], 1):
            path = folder / f"{number:02}-class-{candidate.target}-{candidate.form}.png"
            shown = candidate.trigger.apply(self.samples)
            replace_file(path, strip(self.samples.numpy(), shown.numpy()))
            written.append(path)
        return written


def row_of(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate as plain JSON values, but for its trigger."""
    return {name: getattr(candidate, name) for name in _TOLD}


def _candidate(row: Mapping[str, Any], number: int, tensors: Mapping[str, Tensor]) -> Candidate:
    pattern = tensors[f"candidate{number}.pattern"]
    mask = tensors.get(f"candidate{number}.mask")
    trigger = AddedPattern(pattern) if mask is None else MaskedPattern(mask, pattern)
    return Candidate(
        target=int(row["target"]),
        form=str(row["form"]),
        size=float(row["size"]),
        success=float(row["success"]),
        openness=float(row["openness"]),
        index=float(row["index"]),
        evidence=float(row["evidence"]),
        score=float(row["score"]),
        trigger=trigger,
    )
