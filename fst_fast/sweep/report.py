"""What a sweep shows: one bar, or a line for each cell, and at the end one table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..tuning.progress import Bar, EpochRecord, table_console
from .plan import Cell
from .rows import NOT_MEASURED, Row


class SweepProgress(Bar):
    """Shows the cells as they end.

    Args:
        total: number of cells.
        enabled, console: as of :class:`~fst_fast.tuning.progress.Bar`.
    """

    def __init__(self, total: int, enabled: bool, console: Console | None = None) -> None:
        super().__init__("sweep", total, enabled, console)
        self._title = ""

    def begin(self, cell: Cell) -> None:
        """Show what is worked on."""
        self._title = cell.name
        self._move(cell.name)

    def epoch(self, record: EpochRecord) -> None:
        """Show one finished epoch of it."""
        self._move(f"{self._title} epoch {record.epoch}  cosine {record.cosine:+.2f}")

    def cell(self, row: Row) -> None:
        """Show one finished cell."""
        self._line(f"sweep {self._title}: {outcome(row)}")

    def done(self, count: int) -> None:
        """Show how many cells are finished, by whomever."""
        self._move(completed=count)


def outcome(row: Row) -> str:
    """How a cell ended, in one line."""
    if row.error is not None:
        return f"failed: {row.error}"
    clean = f"clean accuracy {_arrow(row.clean_accuracy_before, row.clean_accuracy_after)}"
    attack = f"attack success {_arrow(row.attack_success_before, row.attack_success_after)}"
    return f"{clean}, {attack}, {row.seconds:.1f} s" + (f"; {row.stopped}" if row.stopped else "")


def show_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print all rows; what failed or stopped early is told below, whole."""
    console = table_console(console, width=200)
    table = Table(
        "checkpoint", "method", "alpha", "seed", "epochs", "clean accuracy", "attack success"
    )
    for name in ("robust accuracy", "cosine", "seconds", "ended"):
        table.add_column(name)
    for row in rows:
        measured = row.error is None
        table.add_row(
            *(row.checkpoint, row.method, "" if row.alpha is None else str(row.alpha)),
            *(str(row.seed), str(row.epochs)),
            _arrow(row.clean_accuracy_before, row.clean_accuracy_after) if measured else "",
            _arrow(row.attack_success_before, row.attack_success_after) if measured else "",
            "" if row.robust_accuracy is None else f"{100 * row.robust_accuracy:.2f} %",
            "" if row.cosine is None else f"{row.cosine:+.3f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
            "failed" if row.error else "stopped" if row.stopped else "whole",
        )
    console.print(table, highlight=False, markup=False)
    for row in rows:
        if not row.whole:
            alpha = "" if row.alpha is None else f" {row.alpha}"
            console.print(
                f"{row.checkpoint} {row.method}{alpha} seed {row.seed}: {row.error or row.stopped}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def _arrow(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return NOT_MEASURED
    return f"{100 * before:.2f} -> {100 * after:.2f} %"
