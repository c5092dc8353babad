"""The folder of a sweep: what is done, and who is at work on what."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..checkpoints.atomic_files import (
    TEMPORARIES,
    dump_json,
    read_object,
    replace_file,
    strict_json,
)
from ..measure.evaluate import Metrics
from .config import Checkpoint
from .plan import FORMAT, Cell, differences
from .rows import Row


@contextlib.contextmanager
def claimed(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process now has the folder to itself; what a dead one half wrote is removed.

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


class SweepFolder:
    """What is on the disk; any number of processes may use it at once.

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
            apart = differences(kept, plan) if kept.get("format") == FORMAT else ["format"]
            if apart:
                raise ValueError(
                    f"sweep: out must be a folder of its own for each sweep, but {self.root} holds "
                    f"one that differs in {'; '.join(apart)}; name another folder, or put that back"
                )
            return kept

    def of(self, cell: Cell) -> Path:
        return self.root / "cells" / cell.name

    def run_of(self, cell: Cell) -> Path:
        """The state of a cell under way, for ``purify(resume=...)``."""
        return self.of(cell) / "run"

    def finished(self, cell: Cell) -> bool:
        return any((self.of(cell) / name).exists() for name in ("purified.json", "failed.json"))

    def row(self, cell: Cell) -> Row:
        """Of a finished cell."""
        done = self.of(cell) / "purified.json"
        kept = _read(done if done.exists() else self.of(cell) / "failed.json")
        return Row(**kept["row"])

    def fail(self, cell: Cell, row: Row) -> None:
        """Write down that a cell failed."""
        replace_file(self.of(cell) / "failed.json", dump_json({"row": asdict(row)}))

    def clear(self, cell: Cell) -> None:
        """Remove the state of a finished cell."""
        shutil.rmtree(self.run_of(cell), ignore_errors=True)

    def forget_failure(self, cell: Cell) -> None:
        """Have a failed cell done again."""
        (self.of(cell) / "failed.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def before(self, suspect: Checkpoint) -> Iterator[Metrics | None]:
        """What the suspect measured, or None: then the caller is alone in measuring it."""
        folder = self.root / "before" / suspect.name
        with claimed(folder, wait=True):
            path = folder / "before.json"
            yield Metrics(**_read(path)) if path.exists() else None

    def keep_before(self, suspect: Checkpoint, metrics: Metrics) -> None:
        """Within :meth:`before`: write it down."""
        data = dump_json(strict_json(asdict(metrics), "before"))
        replace_file(self.root / "before" / suspect.name / "before.json", data)


def _read(path: Path) -> dict[str, Any]:
    found = read_object(path)
    if found is None:
        raise ValueError(
            f"sweep: {path} must hold what the sweep wrote, got a damaged file; remove it to have "
            "that part done again"
        )
    return found
