"""What a sweep consists of: its cells, and the facts in which two runs of it must agree."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import checkpoints, methods
from ..checkpoints import architectures
from ..checkpoints.atomic_files import sha256, strict_json
from ..data import image_sets
from ..data.batches import resolve_precision
from ..data.image_sets import ImageSet
from ..methods import Method
from ..triggers import Trigger
from .config import Checkpoint, Config, takes_alpha

FORMAT = "fst_fast sweep, version 1"
# What of the configuration two runs of one sweep must agree in, beside the checkpoints; files go by
# their content, and where or in what format results are written is free.
SETTINGS = (
    *("size", "normalize", "augment", "batch_size", "methods", "alphas", "seeds"),
    *("epochs", "lr", "momentum", "precision", "threads", "weights"),
)
# The first run's way to compute holds for all of them.
UNCOMPARED = {"computed": None, "versions": None}


@dataclass(frozen=True)
class Cell:
    """One purification.

    Attributes:
        name: of its folder.
        suspect: what is purified.
        method, alpha: as asked for; alpha is None for a method without one.
        chosen: the method that these make.
        seed: of the run.
    """

    name: str
    suspect: Checkpoint
    method: str
    alpha: float | str | None
    chosen: Method
    seed: int


@dataclass(frozen=True)
class Material:
    """The images of a sweep; without test images, the tuning images are measured on."""

    tuning: ImageSet
    test: ImageSet | None


def cells_of(config: Config) -> tuple[Cell, ...]:
    """All cells, in the order of the table: by checkpoint, method, alpha, seed.

    Raises:
        ValueError: two cells would do the same.
    """
    cells: list[Cell] = []
    seen: dict[object, Cell] = {}
    for suspect in config.checkpoints:
        for (method, alpha), seed in itertools.product(_settings(config), config.seeds):
            chosen = methods.get(method, **({} if alpha is None else {"alpha": alpha}))
            parts = [suspect.name, method, *([] if alpha is None else [str(alpha)]), f"s{seed}"]
            cell = Cell("-".join(parts), suspect, method, alpha, chosen, seed)
            twin = seen.setdefault((suspect.name, chosen, seed), cell)
            if twin is not cell:
                raise ValueError(
                    "sweep: methods and alphas must make different cells, got "
                    f"{twin.method} with alpha {twin.alpha} and {method} with alpha {alpha}, which "
                    "are the same; leave one out"
                )
            cells.append(cell)
    return tuple(cells)


def _settings(config: Config) -> Iterator[tuple[str, float | str | None]]:
    """Every method with every alpha; one that takes none comes once."""
    for method in config.methods:
        for alpha in config.alphas if takes_alpha(method) else (None,):
            yield method, alpha


def load_material(config: Config) -> Material:
    """Read the images.

    Raises:
        ValueError: a folder is not there, holds no images, or an image cannot be read.
    """
    test = None if config.test is None else _images("test", config.test, config.size)
    return Material(_images("data", config.data, config.size), test)


def _images(key: str, path: Path, size: int | None) -> ImageSet:
    try:
        return image_sets.read(path, size)
    except ValueError as error:
        raise ValueError(
            f"sweep: {key} must be a folder with one sub-folder of images per class, or an .npz, "
            f"got {path}: {error}"
        ) from None


def check_suspects(config: Config, material: Material) -> None:
    """Refuse what would fail in every cell: absent files, unknown architectures, misfit triggers.

    Raises:
        ValueError: names all that is missing.
    """
    absent = [suspect.path for suspect in config.checkpoints if not suspect.file.is_file()]
    if absent:
        raise ValueError(
            f"sweep: checkpoints must be files, got {len(absent)} that are not there: "
            f"{', '.join(absent[:5])}; correct or remove them"
        )
    built: list[object] = []
    for suspect in config.checkpoints:
        wanted = (suspect.arch, suspect.num_classes, suspect.arch_options)
        if wanted not in built:
            built.append(wanted)
            _check_arch(suspect)
        if suspect.attack is not None:
            _check_trigger(suspect, suspect.attack, material)


def _check_arch(suspect: Checkpoint) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            architectures.build(suspect.arch, suspect.num_classes, **suspect.arch_options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"sweep: arch must be buildable, got {suspect.arch!r} for {suspect.path}: "
            f"{error}; correct arch, arch_options or num_classes"
        ) from None


def _check_trigger(suspect: Checkpoint, trigger: Trigger, material: Material) -> None:
    try:
        trigger.apply((material.test or material.tuning).images[:1])
    except ValueError as error:
        raise ValueError(
            f"sweep: trigger must fit the images, got {type(trigger).__name__} for "
            f"{suspect.path}: {error}; correct trigger_options or size"
        ) from None


def plan_of(config: Config, material: Material, device: torch.device) -> dict[str, Any]:
    """The facts, as JSON data: the settings, the files' hashes, and how it is computed.

    On the CPU, precision "auto" is "fp32": a trial by the clock could end otherwise in the next
    run, and with it the last digits.
    """
    precision = config.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else resolve_precision("auto", device)
    threads = None
    if device.type == "cpu":
        threads = config.threads or torch.get_num_threads()
    return strict_json(
        {
            "format": FORMAT,
            "settings": {name: getattr(config, name) for name in SETTINGS},
            "checkpoints": {
                f"{i} {suspect.path}": _facts_of_suspect(suspect)
                for i, suspect in enumerate(config.checkpoints)
            },
            "data": material.tuning.describe(),
            "test": None if material.test is None else material.test.describe(),
            "device": device.type,
            "computed": {"precision": precision, "threads": threads},
            "versions": checkpoints.versions(),
        },
        "plan",
    )


def _facts_of_suspect(suspect: Checkpoint) -> dict[str, Any]:
    names = ("arch", "arch_options", "num_classes", "head", "target")
    trigger = None if suspect.attack is None else suspect.attack.describe()
    facts = {name: getattr(suspect, name) for name in names}
    return {**facts, "trigger": trigger, "sha256": sha256(suspect.file)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each fact that differs, with both values; what two runs need not agree in is left out."""
    return list(_apart({**before, **UNCOMPARED}, {**now, **UNCOMPARED}))


def _apart(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from (f"{key}.{inner}" for inner in _apart(old, new))
        elif old != new:
            yield f"{key} ({_short(old)} there, {_short(new)} here)"


def _short(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
