"""A sweep: the grid of a configuration, done alone or beside other processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoints
from ..bench import table
from ..checkpoints import architectures
from ..checkpoints.atomic_files import strict_json
from ..data.batches import resolve_device, resolve_precision
from ..data.device_loader import DeviceLoader
from ..data.image_sets import ImageSet
from ..measure.evaluate import Metrics, evaluate
from ..tuning.arguments import to_float32
from ..tuning.autotune import threads_of
from . import columns
from .choice import RUN, Choice
from .columns import NOT_MEASURED
from .config import Checkpoint, Config, choice_of, crosses_alphas, read_config
from .grid import Cell, Done, Grid, GridProgress
from .images import Sets, Uploaded
from .store import Folder, Row, claimed

FORMAT = "fst_fast sweep, version 1"
# The table's notes name a cell by these columns, and its seed.
_NAMED = ("checkpoint", "method", "alpha", "settings")
# Two runs of one sweep must agree in these, beside the checkpoints; files go by their content, and
# where or in what format results are written is free.
SETTINGS = (
    *("size", "normalize", "augment", "batch_size", "methods", "alphas", "seeds"),
    *("epochs", "lr", "momentum", "precision", "threads", "weights"),
)


def run_sweep(path: str | Path, *, retry_failed: bool = False, quiet: bool = False) -> int:
    """Do all cells of the configuration, or what is left of them, and show the table.

    Every process that is started on the same configuration takes cells that no other has; one that
    ends, however it ends, leaves its cell to the others. All of them return when no cell is left.
    Of processes under ``torchrun``, only that of rank 0 writes and shows the table.

    Args:
        path: the YAML file.
        retry_failed: do cells again that failed.
        quiet: no progress.
    Returns:
        0 where every cell is whole; 1 where one failed or stopped early.
    Raises:
        ValueError: the configuration, or something that it names; or the folder belongs to another
            sweep.
        RuntimeError: the results' format cannot be written here.
        OSError: the disk refused.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    config = read_config(path)
    columns.check_format(config.results)
    cells = cells_of(config)
    device = _device(config.device)
    sets = Sets.read(config)
    _check(config, sets.judged)
    sweep = Sweep(config, cells, sets, device)
    if retry_failed:
        for cell in cells:
            sweep.store.forget_failure(cell)
    first = os.environ.get("RANK", "0") == "0"
    with (
        threads_of(sweep.plan["computed"]["threads"]),
        GridProgress(sweep, first and not quiet) as progress,
    ):
        sweep.fill(progress)
    rows = [columns.as_now(sweep.store.row(cell)) for cell in cells]
    if first:
        _conclude(config, rows)
    return 0 if not any(row["error"] or row["stopped"] for row in rows) else 1


def cells_of(config: Config) -> tuple[Cell, ...]:
    """All cells, in the order of the table: by checkpoint, method, alpha, seed.

    Raises:
        ValueError: two cells would do the same.
    """
    seen: dict[object, Choice] = {}
    for entry in config.methods:
        for alpha in config.alphas if crosses_alphas(entry) else (None,):
            choice = _choice(entry, alpha)
            run = {name: getattr(config, name) for name in RUN} | choice.of_run()
            twin = seen.setdefault((choice.method(), *run.values()), choice)
            if twin is not choice:
                raise ValueError(
                    "sweep: methods and alphas must make different cells, got "
                    f"{twin.name} with alpha {twin.alpha} and {choice.name} with alpha "
                    f"{choice.alpha}, which are the same; leave one out"
                )
    return tuple(
        Cell(suspect.name, suspect, choice, seed)
        for suspect in config.checkpoints
        for choice in seen.values()
        for seed in config.seeds
    )


def _choice(entry: str | Mapping[str, Any], alpha: float | str | None) -> Choice:
    """The choice of an entry and an alpha; raises ValueError where the two do not go together."""
    try:
        return choice_of(entry, alpha)
    except ValueError as error:
        raise ValueError(
            f"sweep: methods must take their settings under every alpha, got {entry} with alpha "
            f"{alpha}: {error}; give the entry an alpha of its own"
        ) from None


class Sweep(Grid):
    """The cells of a configuration on one device; the images are uploaded once."""

    command, lenient = "sweep", True
    store: Folder

    def __init__(
        self,
        config: Config,
        cells: Sequence[Cell],
        sets: Sets,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.config, self.cells, self.device = config, cells, device
        self.store = Folder(config.out)
        self.plan = self.store.open(plan_of(config, sets, device))
        self._images = Uploaded(config, sets, device)
        self._measured_on = "tuning images" if sets.test is None else "test images"
        chosen = {name: getattr(config, name) for name in ("epochs", "lr", "momentum")}
        computed = {**self.plan["computed"], "device": device}
        self.settings = {**chosen, **computed, "check": not config.force}

    def model(self, cell: Cell) -> nn.Module:
        suspect: Checkpoint = cell.suspect
        model = checkpoints.load(
            suspect.file, suspect.arch, suspect.num_classes, **suspect.arch_options
        )
        note = to_float32(model)
        if note is not None:
            warnings.warn(f"sweep: {suspect.path}: {note}", stacklevel=2)
        self._images.fit(model)
        return model

    def head(self, cell: Cell) -> tuple[str | None, str]:
        suspect: Checkpoint = cell.suspect
        return suspect.head, repr((suspect.arch, suspect.num_classes, suspect.arch_options))

    def loader(self, cell: Cell) -> DeviceLoader:
        return self._images.drawn(cell.seed or 0)

    def measure(self, cell: Cell, model: nn.Module) -> Metrics:
        return evaluate(
            model,
            self._images.judged,
            cell.suspect.attack,
            cell.suspect.target,
            device=self.device,
            precision=self.settings["precision"],
        )

    def keep(self, done: Done) -> None:
        """The manifest, which ends the cell, and before it the weights."""
        row = columns.row_of(done)
        if done.result is None:
            self.store.keep(done.cell, row, None)
            return
        suspect: Checkpoint = done.cell.suspect
        accuracy, attack = (
            {"before": row[f"{name}_before"], "after": row[f"{name}_after"]}
            for name in ("clean_accuracy", "attack_success")
        )
        facts: Row = {
            "row": row,
            "parent": {"path": suspect.path, "sha256": suspect.sha256},
            "arch": {"name": suspect.arch, **suspect.arch_options},
            "data": self.plan["data"],
            "normalize": self.config.normalize,
            "clean_accuracy": {**accuracy, "measured_on": self._measured_on},
            "attack_success": NOT_MEASURED,
        }
        if suspect.attack is not None:
            facts["attack_success"] = {
                **attack,
                "trigger": suspect.attack.describe(),
                "target": suspect.target,
            }
        if self.config.weights:
            done.result.save(self.store.of(done.cell) / "purified.safetensors", **facts)
        else:
            manifest = {"versions": checkpoints.versions(), **done.result.manifest(**facts)}
            self.store.keep(done.cell, row, manifest)


def plan_of(config: Config, sets: Sets, device: torch.device) -> dict[str, Any]:
    """The facts in which two runs of a sweep must agree, as JSON data, and how it is computed.

    On the CPU, precision "auto" is "fp32": a trial by the clock could end otherwise in the next
    run, and with it the last digits.
    """
    precision = config.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else resolve_precision("auto", device)
    threads = config.threads or torch.get_num_threads()
    plan = {
        "format": FORMAT,
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "checkpoints": {
            f"{i} {suspect.path}": suspect.facts() for i, suspect in enumerate(config.checkpoints)
        },
        **sets.plan(),
        "device": device.type,
        "computed": {"precision": precision, "threads": threads if device.type == "cpu" else None},
        "versions": checkpoints.versions(),
    }
    found: dict[str, Any] = strict_json(plan, "plan")
    return found


def _device(asked: str | None) -> torch.device:
    """As asked for; under ``torchrun``, of several GPUs one for each process."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and asked in (None, "cuda") and torch.cuda.is_available():
        # More processes than GPUs: several small models in flight on each.
        return torch.device("cuda", int(rank) % torch.cuda.device_count())
    try:
        return resolve_device(asked, nn.Identity())
    except ValueError as error:
        raise ValueError(f"sweep: {error}") from None


def _check(config: Config, test: ImageSet) -> None:
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
        try:
            if wanted not in built:
                built.append(wanted)
                with torch.random.fork_rng(devices=[]):
                    architectures.build(suspect.arch, suspect.num_classes, **suspect.arch_options)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"sweep: arch must be buildable, got {suspect.arch!r} for {suspect.path}: "
                f"{error}; correct arch, arch_options or num_classes"
            ) from None
        try:
            if suspect.attack is not None:
                suspect.attack.apply(test.images[:1])
        except ValueError as error:
            raise ValueError(
                f"sweep: trigger must fit the images, got {type(suspect.attack).__name__} for "
                f"{suspect.path}: {error}; correct trigger_options or size"
            ) from None


def _conclude(config: Config, rows: Sequence[Row]) -> None:
    """Write the results, and show them; what failed or stopped early is told below, whole."""
    with claimed(config.out, wait=True):
        path = columns.write_rows(config.out, rows, config.results)
    early = [row for row in rows if row["error"] or row["stopped"]]
    notes = [
        " ".join(str(row[key]) for key in _NAMED if row[key] is not None)
        + f" seed {row['seed']}: {row['error'] or row['stopped']}"
        for row in early
    ]
    table.show(*columns.table_of(rows), notes=notes)
    failed = sum(row["error"] is not None for row in rows)
    stopped = sum(row["stopped"] is not None for row in rows)
    print(f"{len(rows)} cells, {failed} failed, {stopped} stopped early; wrote {path}")
