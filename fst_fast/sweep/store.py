"""Keeps what of a grid is done: rows in a folder of cells, or in one record."""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from .. import checkpoints
from ..bench import machine, records
from ..checkpoints.atomic_files import (
    TEMPORARIES,
    dump_json,
    read_object,
    replace_file,
    strict_json,
)
from ..measure.evaluate import Metrics

if TYPE_CHECKING:
    from .grid import Cell

Row = dict[str, Any]
# The first run's way to compute holds for all runs of a grid.
UNCOMPARED = {"computed": None, "versions": None}
# The record already holds these facts of a suspect, or another file describes them.
ELSEWHERE = ("versions", "data", "made_by", "format", "format_version", "payload", "size_bytes")


@contextlib.contextmanager
def claimed(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Yield whether this process has the folder to itself; a dead one's leftovers are removed.

    The claim is a lock of the operating system on a file in it, which ends with the process,
    however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        for left in folder.glob(TEMPORARIES):
            left.unlink()
        yield True
    finally:
        lock.release()


class Folder:
    """A sweep's folder; any number of processes may use it at once.

    ``sweep.json`` holds the plan, ``before/<checkpoint>/before.json`` what a suspect measured,
    ``cells/<cell>/`` a cell: ``purified.json`` and, if asked for, ``purified.safetensors`` where it
    is done, ``failed.json`` where it failed, ``run/`` while it runs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Make the folder, or go on in it; returns the plan of the run that made it.

        Raises:
            ValueError: it belongs to another sweep, or is a file.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"sweep: out must be a folder, got the file {self.root}; name another")
        with claimed(self.root, wait=True):
            path = self.root / "sweep.json"
            if not path.exists():
                replace_file(path, dump_json(plan))
                return dict(plan)
            kept = _read(path)
            same = kept.get("format") == plan["format"]
            apart = differences(kept, plan) if same else ["format"]
            if apart:
                raise ValueError(
                    f"sweep: out must be a folder of its own for each sweep, but {self.root} holds "
                    f"one that differs in {'; '.join(apart)}; name another folder, or put that back"
                )
            return kept

    def of(self, cell: Cell) -> Path:
        return self.root / "cells" / cell.name

    def finished(self, cell: Cell) -> Path | None:
        """The file that holds how a finished cell ended."""
        ends = (self.of(cell) / name for name in ("purified.json", "failed.json"))
        return next(filter(Path.exists, ends), None)

    def row(self, cell: Cell) -> Row:
        """Return the row of a finished cell."""
        return dict(_read(self.finished(cell) or self.of(cell))["row"])

    def keep(self, cell: Cell, row: Row, manifest: Mapping[str, Any] | None) -> None:
        """Write down a cell without weights; one without a manifest failed."""
        name = "failed.json" if manifest is None else "purified.json"
        whole = {**(manifest or {}), "row": row}
        replace_file(self.of(cell) / name, dump_json(strict_json(whole, "manifest")))

    def forget_failure(self, cell: Cell) -> None:
        """Have a failed cell done again."""
        (self.of(cell) / "failed.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def before(self, title: str) -> Iterator[Metrics | None]:
        """Yield what a suspect measured, or None: then the caller is alone in measuring it."""
        with claimed(self.root / "before" / title, wait=True):
            path = self.root / "before" / title / "before.json"
            yield Metrics(**_read(path)) if path.exists() else None

    def keep_before(self, title: str, metrics: Metrics) -> None:
        """Within :meth:`before`: write it down."""
        data = dump_json(strict_json(asdict(metrics), "before"))
        replace_file(self.root / "before" / title / "before.json", data)

    def claim(self, cell: Cell) -> AbstractContextManager[bool]:
        """Say whether this process alone may do the cell."""
        return claimed(self.of(cell), wait=False)

    def run_of(self, cell: Cell) -> Path:
        """The state of a cell under way, for ``purify(resume=...)``."""
        return self.of(cell) / "run"

    def clear(self, cell: Cell) -> None:
        """Remove the state of a finished cell."""
        shutil.rmtree(self.run_of(cell), ignore_errors=True)


class Record:
    """A table's record, of one process at a time: one file that is whole after every cell."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def open(cls, folder: Path, name: str, settings: Row, device: torch.device) -> Record:
        """The newest record of this name in the folder that has these settings, or a new one.

        Args:
            folder: holds ``<device>/<date>-efficacy-<name>.json``.
            name: of the table.
            settings: in which two runs of one table agree, but for the seeds: those that the record
                lacks are added to it.
            device: it is done on.
        Raises:
            ValueError: today's record of this name has other settings, or is damaged.
        """
        settings = strict_json(settings, "settings")
        place = machine.describe(device)
        directory = folder / place["type"]
        for path in sorted(directory.glob(f"*-efficacy-{name}.json"), reverse=True):
            kept = _read(path)
            if not _apart(kept, settings) and kept["device"]["name"] == place["name"]:
                agreed = kept["settings"]
                agreed["seeds"] = max(agreed["seeds"], settings["seeds"])
                return cls(path, kept)
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        path = directory / f"{date}-efficacy-{name}.json"
        if path.exists():
            apart = _apart(_read(path), settings) or ["device"]
            raise ValueError(
                f"lab table: {path} must be of this table to go on with it, but differs in "
                f"{'; '.join(apart[:5])}; put that back, move it away or give another --name"
            )
        directory.mkdir(parents=True, exist_ok=True)
        facts = {"suite": "efficacy", "name": name, "date": date, **records.sources()}
        computed = {"device": place, "versions": checkpoints.versions(), "settings": settings}
        return cls(path, {**facts, **computed, "suspects": {}})

    def begin(self, title: str, manifest: Mapping[str, Any]) -> None:
        """A suspect, by its manifest; one that is there already stays."""
        facts = {key: value for key, value in manifest.items() if key not in ELSEWHERE}
        self.content["suspects"].setdefault(title, {**facts, "rows": []})

    def rows(self, title: str) -> list[Row]:
        """Return a suspect's rows as they were added."""
        return list(self.content["suspects"].get(title, {}).get("rows", []))

    def finished(self, cell: Cell) -> Row | None:
        """The row of this suspect, method, alpha, settings and seed."""
        # As the record has them, in which a tuple is a list.
        wanted = strict_json(cell.facts, "facts")
        for row in self.rows(cell.title):
            if all(row.get(k) == wanted.get(k) for k in ("method", "alpha", "settings", "seed")):
                return row
        return None

    def add(self, cell: Cell, row: Row) -> None:
        """Write down a row; the file is whole at every moment."""
        commit = records.sources()["commit"]
        self.content["suspects"][cell.title]["rows"].append({**row, "commit": commit})
        self.content = strict_json(self.content, "record")
        replace_file(self.path, dump_json(self.content))

    @contextlib.contextmanager
    def before(self, title: str) -> Iterator[Metrics | None]:
        """Yield the metrics of the first row, in which nothing is done."""
        yield Metrics(**{name: self.rows(title)[0][name] for name in Metrics.__dataclass_fields__})

    def keep_before(self, title: str, metrics: Metrics) -> None:
        """The first row holds it."""

    def claim(self, cell: Cell) -> AbstractContextManager[bool]:
        """Always: the record has one process at a time."""
        return contextlib.nullcontext(True)

    def run_of(self, cell: Cell) -> None:
        """A cell that was interrupted begins anew."""

    def clear(self, cell: Cell) -> None:
        """There is no state."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each fact that differs, with both values; what two runs need not agree in is left out."""

    def apart(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
        for key in sorted(before.keys() | now.keys()):
            old, new = before.get(key), now.get(key)
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                yield from (f"{key}.{inner}" for inner in apart(old, new))
            elif old != new:
                yield f"{key} ({_short(old)} there, {_short(new)} here)"

    return list(apart({**before, **UNCOMPARED}, {**now, **UNCOMPARED}))


def _short(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _apart(kept: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """In what a record is of another table."""
    agreed = kept.get("settings", {})
    seeds = {"seeds": settings["seeds"]} if isinstance(agreed.get("seeds"), int) else {}
    return differences({**agreed, **seeds}, settings)


def _read(path: Path) -> dict[str, Any]:
    found = read_object(path)
    if found is None:
        raise ValueError(
            f"sweep: {path} must hold what the grid wrote, got a damaged file; move it away "
            "to have that part done again"
        )
    return found
