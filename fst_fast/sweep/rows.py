"""The rows of a sweep's table, and the file that holds them."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoints.atomic_files import replace_file

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """One cell; all rates in 0..1.

    Attributes:
        checkpoint: its path, as the configuration has it.
        sha256: of that file.
        method, alpha, seed: of the run; no alpha for a method that takes none.
        epochs: done; of ``fst`` with alpha "auto" four times as many as asked for.
        clean_accuracy_before, clean_accuracy_after: on the test images, else on the tuning images.
        attack_success_before, attack_success_after: None where no trigger is given, or no image of
            another class came: not measured.
        robust_accuracy: share of triggered images still classified as their label, after.
        cosine: between the head's final and original weight.
        seconds: of tuning.
        stopped: why the run ended early.
        error: why there is no purified model.
    """

    checkpoint: str
    sha256: str
    method: str
    alpha: float | str | None
    seed: int
    epochs: int = 0
    clean_accuracy_before: float | None = None
    clean_accuracy_after: float | None = None
    attack_success_before: float | None = None
    attack_success_after: float | None = None
    robust_accuracy: float | None = None
    cosine: float | None = None
    seconds: float | None = None
    stopped: str | None = None
    error: str | None = None

    @property
    def whole(self) -> bool:
        """Neither failed nor stopped early."""
        return self.error is None and self.stopped is None


COLUMNS = tuple(field.name for field in fields(Row))


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
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row)
        if row.error is None:
            for name in ("attack_success_before", "attack_success_after", "robust_accuracy"):
                values[name] = NOT_MEASURED if values[name] is None else values[name]
        writer.writerow(values)
    return out.getvalue().encode()


def _parquet(rows: Sequence[Row]) -> bytes:
    arrow, parquet = _pyarrow()
    kinds = {"str": arrow.string(), "int": arrow.int64(), "float": arrow.float64()}
    # alpha is a number or a word: text.
    types = [
        arrow.field(field.name, kinds[str(field.type).split(" | ")[0]])
        if field.name != "alpha"
        else arrow.field("alpha", arrow.string())
        for field in fields(Row)
    ]
    content = [
        {**asdict(row), "alpha": None if row.alpha is None else str(row.alpha)} for row in rows
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
