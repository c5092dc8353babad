"""Progress of a run: a rich bar on a terminal, one plain line per epoch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a run.

    Attributes:
        epoch: from 1.
        loss: mean over the epoch's images of the method's loss, penalty included.
        clean_accuracy: in 0..1, on ``validation=`` after the epoch, or, without one, on the
            tuning images as they passed during the epoch.
        lr: learning rate of the epoch.
        cosine: between the head's weight and its original weight, after the epoch.
        norm: Frobenius norm of the head's weight, after the epoch.
        seconds: since the start of the run.
    """

    epoch: int
    loss: float
    clean_accuracy: float
    lr: float
    cosine: float
    norm: float
    seconds: float


def table_console(console: Console | None = None, width: int = 180) -> Console:
    """Return a console for a wide table: plain text of that width where there is no terminal."""
    console = console or Console()
    if console.is_terminal:
        return console
    return Console(file=console.file, width=width, color_system=None)


class Bar:
    """One bar on a terminal, plain lines elsewhere; a context manager.

    Args:
        title: of the bar.
        total: how many steps it has.
        enabled: False shows nothing.
        console: where to write; None is the standard error stream.
    """

    def __init__(
        self, title: str, total: int, enabled: bool, console: Console | None = None
    ) -> None:
        self._console = console or Console(stderr=True)
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}", markup=False),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=total, state="")

    def __enter__(self) -> Self:
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

    def note(self, text: str) -> None:
        """Show one line beside the bar."""
        if self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _move(self, state: str | None = None, completed: int | None = None) -> None:
        """Set the bar's text and how far it is; None leaves either."""
        if self._bar is not None:
            said: dict[str, Any] = {} if state is None else {"state": state}
            self._bar.update(self._task, completed=completed, **said)

    def _line(self, text: str) -> None:
        """Show one line where there is no bar."""
        if self._bar is None:
            self.note(text)


class ProgressReport(Bar):
    """Shows epochs as they end.

    Args:
        title: what runs, such as "fst".
        epochs: how many will come.
        enabled, console: as of :class:`Bar`.
    """

    def __init__(
        self, title: str, epochs: int, enabled: bool, console: Console | None = None
    ) -> None:
        super().__init__(title, epochs, enabled, console)
        self._title, self._epochs = title, epochs

    def expect(self, epochs: int) -> None:
        """Set how many epochs will come."""
        self._epochs = epochs
        if self._bar is not None:
            self._bar.update(self._task, total=epochs)

    def epoch(self, record: EpochRecord) -> None:
        """Show one finished epoch."""
        state = (
            f"loss {record.loss:.3f}  accuracy {100 * record.clean_accuracy:.1f} %  "
            f"cosine {record.cosine:+.2f}"
        )
        self._move(state, record.epoch)
        self._line(
            f"{self._title} epoch {record.epoch}/{self._epochs}  {state}  "
            f"lr {record.lr:.4f}  {record.seconds:.1f} s"
        )
