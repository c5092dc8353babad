"""The columns of a sweep's table: what each holds, in its file and on the terminal.

A new column is one more entry of :data:`COLUMNS`.
"""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.atomic_files import replace_file
from .grid import Done, arrow
from .store import Row

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: in files.
        kind: of its values, beside None.
        source: the value's place in a :class:`~fst_fast.sweep.grid.Done`; None where that ends.
        heading: on the terminal; None does not show it there.
        text: of a row, on the terminal; None takes the value as it is.
        may_lack: None means that it was not measured.
    """

    name: str
    kind: type
    source: str
    heading: str | None = None
    text: Callable[[Row], str] | None = None
    may_lack: bool = False

    def value(self, done: Done) -> Any:
        found: Any = done
        for part in self.source.split("."):
            found = None if found is None else getattr(found, part)
        return found

    def plain(self, row: Row) -> str:
        return "" if row[self.name] is None else str(row[self.name])


def _pair(name: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        return "" if row["error"] else arrow(row[f"{name}_before"], row[f"{name}_after"])

    return text


def _formatted(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if row[name] is None else form.format(scale * row[name])


def _ended(row: Row) -> str:
    return "failed" if row["error"] else "stopped" if row["stopped"] else "whole"


_CLEAN, _ATTACK = "clean_accuracy", "attack_success"
_ROBUST = _formatted("robust_accuracy", "{:.2f} %", 100)
# Rates are in 0..1.
COLUMNS = (
    # The path as the configuration has it, and the digest of that file.
    Column("checkpoint", str, "cell.suspect.path", "checkpoint"),
    Column("sha256", str, "cell.suspect.sha256"),
    Column("method", str, "cell.choice.name", "method"),
    # A number, "auto", or None for a method that takes none.
    Column("alpha", object, "cell.choice.alpha", "alpha"),
    # The entry's further settings as JSON, of the method and of the run; None where it has none.
    Column("settings", str, "cell.choice.written", "settings"),
    Column("seed", int, "cell.seed", "seed"),
    # These were done: for ``fst`` with alpha "auto" four times as many as asked for.
    Column("epochs", int, "epochs", "epochs"),
    # On the test images, else on the tuning images.
    Column(f"{_CLEAN}_before", float, "before.clean_accuracy"),
    Column(f"{_CLEAN}_after", float, "after.clean_accuracy", "clean accuracy", _pair(_CLEAN)),
    # None where no trigger is given, or no image of another class came.
    Column(f"{_ATTACK}_before", float, "before.attack_success", may_lack=True),
    Column(
        f"{_ATTACK}_after", float, "after.attack_success", "attack success", _pair(_ATTACK), True
    ),
    # The share of triggered images still classified as their label, after.
    Column("robust_accuracy", float, "after.robust_accuracy", "robust accuracy", _ROBUST, True),
    # Between the head's final and original weight.
    Column("cosine", float, "result.head_shift.cosine", "cosine", _formatted("cosine", "{:+.3f}")),
    # The seconds are those of tuning.
    Column("seconds", float, "seconds", "seconds", _formatted("seconds", "{:.1f}")),
    # Why the run ended early; why there is no purified model.
    Column("stopped", str, "result.stopped"),
    Column("error", str, "error", "ended", _ended),
)


def row_of(done: Done) -> Row:
    """One cell."""
    return {column.name: column.value(done) for column in COLUMNS}


def as_now(row: Row) -> Row:
    """A row that was written down, with the columns of now: one that it lacks is None."""
    return {column.name: row.get(column.name) for column in COLUMNS}


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people."""
    columns = [column for column in COLUMNS if column.heading is not None]
    cells = [[(column.text or column.plain)(row) for column in columns] for row in rows]
    return [str(column.heading) for column in columns], cells


def check_format(results: str) -> None:
    """Refuse, before any work, a format that cannot be written here.

    Raises:
        RuntimeError: "parquet" without pyarrow.
    """
    if results == "parquet":
        _pyarrow()


def write_rows(folder: Path, rows: Sequence[Row], results: str) -> Path:
    """Write ``results.csv`` or ``results.parquet``, all or nothing; returns its path.

    In CSV an attack that was not measured reads "not measured"; in Parquet it is null.
    """
    path = folder / f"results.{results}"
    replace_file(path, _parquet(rows) if results == "parquet" else _csv(rows))
    return path


def _csv(rows: Sequence[Row]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, [column.name for column in COLUMNS], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        lacks = [c.name for c in COLUMNS if c.may_lack and row[c.name] is None and not row["error"]]
        writer.writerow({**row, **dict.fromkeys(lacks, NOT_MEASURED)})
    return out.getvalue().encode()


def _parquet(rows: Sequence[Row]) -> bytes:
    arrow, parquet = _pyarrow()
    kinds = {str: arrow.string(), int: arrow.int64(), float: arrow.float64()}
    # A column of numbers and words is text.
    types = [arrow.field(c.name, kinds.get(c.kind, arrow.string())) for c in COLUMNS]
    mixed = [column.name for column in COLUMNS if column.kind is object]
    content = [
        {**row, **{name: None if row[name] is None else str(row[name]) for name in mixed}}
        for row in rows
    ]
    sink = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(content, arrow.schema(types)), sink)
    return sink.getvalue()


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise RuntimeError(
            "sweep: results must be csv where pyarrow is not installed, got parquet; "
            "pip install pyarrow, or write `results: csv`"
        ) from None
