"""What a sweep shows: one bar, or a line for each cell, and at the end one table."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..progress import EpochRecord, table_console
from .plan import Cell
from .rows import NOT_MEASURED, Row


class SweepProgress:
    """Shows the cells as they end; a context manager.

    Args:
        total: number of cells.
        enabled: False shows nothing.
        console: where to write; None is the standard error stream.
    """

    def __init__(self, total: int, enabled: bool, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._total, self._enabled = total, enabled
        self._bar: Progress | None = None
        self._title = ""
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("sweep"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}", markup=False),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total, state="")

    def __enter__(self) -> SweepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, cell: Cell) -> None:
        """Show what is worked on."""
        self._title = cell.name
        self._state(cell.name)

    def epoch(self, record: EpochRecord) -> None:
        """Show one finished epoch of it."""
        self._state(f"{self._title} epoch {record.epoch}  cosine {record.cosine:+.2f}")

    def cell(self, row: Row) -> None:
        """Show one finished cell."""
        if self._enabled and self._bar is None:
            self._print(f"sweep {self._title}: {outcome(row)}")

    def done(self, count: int) -> None:
        """Show how many cells are finished, by whomever."""
        if self._bar is not None:
            self._bar.update(self._task, completed=count)

    def note(self, text: str) -> None:
        """Show one line beside the progress."""
        if self._enabled:
            self._print(text)

    def _state(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, state=text)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


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
