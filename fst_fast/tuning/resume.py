"""A run that can be ended at any moment and goes on from where it was last kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..checkpoints.atomic_files import TEMPORARIES, replace_file
from ..data.batches import Batches
from .loop import Tuner
from .method_run import Position
from .progress import EpochRecord, ProgressReport

NAME = "state.safetensors"
FORMAT = "fst_fast run, version 4"


class RunFolder:
    """The folder given as ``resume=``: one file, replaced after every epoch or not at all.

    It holds the weights, the head's original weight and its norm, all momentum, the loss scale,
    the averaged weights, the random states and the history. A loader that draws from a generator
    of its own (``DataLoader(generator=...)``) has that state kept as well; a DeviceLoader goes by
    the epoch's number. After Ctrl-C or SIGTERM it also holds how far the epoch had come, and the
    random states of its start, so that the loader can be led to the same place.

    Args:
        folder: made if it is not there.
        asked: what a run must agree in to be gone on with: settings, seed, the suspect's weights.
        batches: of the tuning loader.
        device: whose random numbers the run draws.
    Attributes:
        writes: whether :meth:`keep` does; in a data parallel run one rank does.
    Raises:
        ValueError: ``folder`` is a file.
    """

    def __init__(
        self, folder: str | Path, asked: Mapping[str, Any], batches: Batches, device: torch.device
    ) -> None:
        self.folder, self.writes = Path(folder), True
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"purify: resume must be a folder, got the file {self.folder}; name a folder of "
                "its own for each run"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        # A process that was killed while it wrote may have left these.
        for left in self.folder.glob(TEMPORARIES):
            left.unlink()
        self.asked = json.loads(json.dumps(dict(asked), sort_keys=True, default=str))
        self._generators, self._device = generators_of(batches.loader), device
        self._draws_ahead = batches.draws_ahead
        self._start: _Draws | None = None
        self._catch_up: Callable[[], None] = lambda: None

    def keep(self, tuner: Tuner) -> None:
        """Write down where the run stands: after an epoch, or where it was interrupted."""
        within = tuner.position.within
        if not self.writes:
            return
        if within and (self._draws_ahead or tuner.head.weight_scale is not None):
            # Such a run cannot go on to the bit: batches were drawn ahead, or the head was rounded.
            return
        tensors = {name: value.detach().cpu() for name, value in tuner.state.saved().items()}
        facts = {
            "format": FORMAT,
            "asked": self.asked,
            "history": [dataclasses.asdict(record) for record in tuner.history],
            "findings": [dict(found) for found in tuner.findings],
            "position": dataclasses.asdict(tuner.position),
        }
        draws = {"now": _Draws.take(self._device, self._generators)}
        if within and self._start is not None:
            draws["start"] = self._start
        for moment, drawn in draws.items():
            tensors |= {f"random.{moment}.{name}": value for name, value in drawn.tensors.items()}
            facts[moment] = drawn.facts
        # safetensors takes no tensor that shares its memory.
        tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
        facts["digest"] = _digest(tensors, facts)
        data = safetensors.torch.save(tensors, {"facts": json.dumps(facts)})
        replace_file(self.folder / NAME, data)

    def restore(self, tuner: Tuner) -> bool:
        """Put the tuner, and the random states, where the last epoch left them.

        Returns:
            Whether there was anything to go on with.
        Raises:
            ValueError: the folder holds another run, or a damaged file.
        """
        path = self.folder / NAME
        if not path.exists():
            return False
        tensors, facts = _read(path)
        if facts["asked"] != self.asked:
            before = facts["asked"]
            apart = [
                f"{key} ({_short(before.get(key))} there, {_short(self.asked.get(key))} here)"
                for key in sorted({*before, *self.asked})
                if before.get(key) != self.asked.get(key)
            ]
            raise ValueError(
                f"purify: resume must name the folder of the same run, but {path} differs in "
                f"{', '.join(apart)}; give this run a folder of its own"
            )
        with torch.no_grad():
            for name, value in tuner.state.saved().items():
                value.copy_(tensors[name])
        tuner.history[:] = [EpochRecord(**record) for record in facts["history"]]
        tuner.findings[:] = facts["findings"]
        tuner.position = Position(**facts["position"])

        def put(moment: str) -> None:
            prefix = f"random.{moment}."
            drawn = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            _Draws(drawn, facts[moment]).put(self._device, self._generators)

        put("start" if tuner.position.within else "now")
        self._catch_up = lambda: put("now")
        return True

    def begin_epoch(self) -> None:
        self._start = _Draws.take(self._device, self._generators)

    def caught_up(self) -> None:
        self._catch_up()


def follow_in(
    folder: str | Path,
    tuner: Tuner,
    asked: Mapping[str, Any],
    batches: Batches,
    report: ProgressReport,
) -> RunFolder:
    """Take up the run that the folder holds, if any; returns the folder, which keeps it."""
    asked = {**asked, **tuner.method.settings(), **tuner.settings.plain()}
    run = RunFolder(folder, asked, batches, tuner.settings.compute.device)
    if run.restore(tuner):
        where = f"behind epoch {tuner.position.epoch} of {tuner.epochs}"
        if tuner.position.within:
            where += f", step {tuner.position.step} of the next"
        report.note(f"purify: goes on {where}")
    return run


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:8]}..."


def arrangement_of(folder: str | Path) -> dict[str, Any] | None:
    """Return how the run in the folder computed its steps; None where there is no run yet.

    What a trial chose must stay: it is part of the bits.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return None
    _, facts = _read(path)
    return {name: facts["asked"][name] for name in ("precision", "channels_last", "threads")}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        right = facts.pop("digest") == _digest(tensors, facts)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    else:
        if right and facts["format"] == FORMAT:
            return tensors, facts
        reason = "a wrong digest" if not right else f"the format {facts['format']!r}"
    raise ValueError(
        f"purify: resume found a damaged or foreign {path}, with {reason}; restore it from a "
        "copy, or remove it to start anew"
    )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's names and values."""
    return _digest({name: value.cpu() for name, value in model.state_dict().items()}, {})


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def generators_of(loader: object) -> list[torch.Generator]:
    """The generators of its own that a loader, or the loader in it, draws from."""
    inner = getattr(loader, "loader", loader)
    places = (loader, inner, getattr(inner, "sampler", None))
    found = [getattr(place, "generator", None) for place in places]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


@dataclasses.dataclass(frozen=True)
class _Draws:
    """All random states that a run draws from.

    Attributes:
        tensors: of torch, its GPU and the loader's own generators.
        facts: of Python and NumPy, as JSON data.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @classmethod
    def take(cls, device: torch.device, generators: list[torch.Generator]) -> _Draws:
        tensors = {"torch": torch.get_rng_state()}
        if device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(device)
        tensors |= {f"loader.{i}": g.get_state() for i, g in enumerate(generators)}
        # Transforms draw from NumPy's global state.
        kind, key, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
        numpy_state = [kind, np.asarray(key).tolist(), *rest]
        return cls(tensors, {"python": random.getstate(), "numpy": numpy_state})

    def put(self, device: torch.device, generators: list[torch.Generator]) -> None:
        torch.set_rng_state(self.tensors["torch"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.tensors["cuda"], device)
        for i, generator in enumerate(generators):
            generator.set_state(self.tensors[f"loader.{i}"])
        version, internal, gauss = self.facts["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, key, *rest = self.facts["numpy"]
        np.random.set_state((kind, np.array(key, dtype=np.uint32), *rest))  # noqa: NPY002
