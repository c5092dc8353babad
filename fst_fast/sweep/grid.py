"""The resumable grid that a sweep and the lab's table are: suspects x methods x seeds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data.device_loader import DeviceLoader
from ..measure.evaluate import Metrics
from ..tuning.progress import Bar, EpochRecord
from ..tuning.purify import purify
from ..tuning.result import PurifyResult
from .choice import Choice
from .store import Folder, Record

# Seconds between two looks at cells that other processes are at work on.
WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Cell:
    """One purification of one suspect.

    Attributes:
        title: the suspect, by its name in the grid.
        suspect: as the grid knows it.
        choice: the method.
        seed: of the run; None where nothing is done.
    """

    title: str
    suspect: Any
    choice: Choice
    seed: int | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Method, alpha, settings and seed, those that it has."""
        choice = self.choice
        found: dict[str, Any] = {"method": choice.name, "alpha": choice.alpha, "seed": self.seed}
        found["settings"] = dict(choice.settings) or None
        return {name: value for name, value in found.items() if value is not None}

    @property
    def name(self) -> str:
        """The name of its folder."""
        seed = [] if self.seed is None else [f"s{self.seed}"]
        alpha = [] if self.choice.alpha is None else [str(self.choice.alpha)]
        digest = [self.choice.digest] if self.choice.settings else []
        return "-".join([self.title, self.choice.name, *alpha, *digest, *seed])


@dataclass(frozen=True)
class Done:
    """The outcome of a cell; if it failed, all is None but ``cell`` and ``error``.

    Attributes:
        model: what was made of the suspect.
        before, after: what the suspect and the model measured.
        result: of the purification; None where nothing was done.
        error: why there is no model.
    """

    cell: Cell
    model: nn.Module | None = None
    before: Metrics | None = None
    after: Metrics | None = None
    result: PurifyResult | None = None
    error: str | None = None

    @property
    def epochs(self) -> int:
        """The epochs that were done."""
        return 0 if self.result is None else len(self.result.history)

    @property
    def seconds(self) -> float | None:
        """The seconds of tuning, in all runs that the cell took."""
        if self.result is None:
            return None
        history = self.result.history
        return history[-1].seconds if history else self.result.seconds

    def __str__(self) -> str:
        if self.error is not None:
            return f"failed: {self.error}"
        pairs = [(m.clean_accuracy, m.attack_success) for m in (self.before, self.after) if m]
        clean, attack = (arrow(*rates) for rates in zip(*pairs, strict=True))
        text = f"clean accuracy {clean}, attack success {attack}"
        if self.result is not None:
            text += f", {self.seconds:.1f} s"
            text += f"; {self.result.stopped}" if self.result.stopped else ""
        return text


class Grid:
    """The cells of a grid; what each is done on, and where it is written down.

    Attributes:
        command: its name.
        cells: in the order of its table.
        store: what is done.
        settings: arguments of :func:`fst_fast.purify` that all cells share.
        lenient: a cell that fails is written down, and leaves the others alone.
    """

    command: str
    cells: Sequence[Cell]
    store: Folder | Record
    settings: Mapping[str, Any]
    lenient = False

    def __init__(self) -> None:
        # Each architecture has the head that its first run found: to look for it takes a tenth of
        # a second or more.
        self._heads: dict[str, str] = {}

    def model(self, cell: Cell) -> nn.Module:
        """The suspect's model, which may be changed."""
        raise NotImplementedError

    def head(self, cell: Cell) -> tuple[str | None, str]:
        """The name of the model's head, or None; and its architecture."""
        raise NotImplementedError

    def loader(self, cell: Cell) -> DeviceLoader:
        """The tuning images, under the cell's seed."""
        raise NotImplementedError

    def measure(self, cell: Cell, model: nn.Module) -> Metrics:
        """The model under the suspect's attack."""
        raise NotImplementedError

    def keep(self, done: Done) -> None:
        """Write down how a cell ended."""
        raise NotImplementedError

    def fill(self, progress: GridProgress) -> None:
        """Take free cells until all are finished.

        Raises:
            OSError: the disk refused: a matter of the grid, not of a cell.
            KeyboardInterrupt: Ctrl-C; the same call goes on.
        """
        store, total = self.store, len(self.cells)
        finished = [cell for cell in self.cells if store.finished(cell)]
        if finished:
            progress.note(f"{self.command}: goes on; {len(finished)} of {total} cells are done")
        for cell in finished:
            # Left by a process that ended between a cell's end and the tidying up.
            store.clear(cell)
        while waiting := [cell for cell in self.cells if not store.finished(cell)]:
            progress.count(total - len(waiting))
            if not sum(self._take(cell, progress) for cell in waiting):
                time.sleep(WAIT_SECONDS)
        progress.count(total)

    def _take(self, cell: Cell, progress: GridProgress) -> bool:
        """Do the cell if nobody else does or has; returns whether."""
        with self.store.claim(cell) as mine:
            if not mine or self.store.finished(cell):
                return False
            progress.begin(cell)
            try:
                done = self._do(cell, progress)
                self.keep(done)
            except OSError:
                raise
            # Whatever a file, an architecture or a device does wrong is this cell's trouble alone.
            except Exception as error:
                if not self.lenient:
                    raise
                done = Done(cell, error=f"{type(error).__name__}: {error}")
                self.keep(done)
            self.store.clear(cell)
            progress.end(done)
            return True

    def _do(self, cell: Cell, progress: GridProgress) -> Done:
        """Do the cell, or go on with it."""
        model, method = self.model(cell), cell.choice.method()
        if method is None:
            measured = self.measure(cell, model)
            return Done(cell, model, measured, measured)
        with self.store.before(cell.title) as known:
            before = known or self.measure(cell, model)
            if known is None:
                self.store.keep_before(cell.title, before)
        head, architecture = self.head(cell)
        result = purify(
            model,
            self.loader(cell),
            method=method,
            seed=cell.seed or 0,
            head=head or self._heads.get(architecture),
            resume=self.store.run_of(cell),
            channels_last=True,
            progress=False,
            callbacks=[lambda record, model: progress.epoch(record)],
            inplace=True,
            **{**self.settings, **cell.choice.of_run()},
        )
        if head is None:
            self._heads[architecture] = str(result.settings["head"])
        if result.stopped is not None and result.stopped.startswith("interrupted"):
            raise KeyboardInterrupt
        return Done(cell, result.model, before, self.measure(cell, result.model), result)


class GridProgress(Bar):
    """Shows the cells of a grid as they end: one bar, or a line for each."""

    def __init__(self, grid: Grid, enabled: bool) -> None:
        super().__init__(grid.command, len(grid.cells), enabled)
        self._command, self._cell = grid.command, ""

    def begin(self, cell: Cell) -> None:
        """Show what is worked on."""
        self._cell = cell.name
        self._move(cell.name)

    def epoch(self, record: EpochRecord) -> None:
        """Show one finished epoch of it."""
        self._move(f"{self._cell} epoch {record.epoch}  cosine {record.cosine:+.2f}")

    def end(self, done: Done) -> None:
        """Show one finished cell."""
        self._line(f"{self._command} {self._cell}: {done}")

    def count(self, cells: int) -> None:
        """Show how many cells are finished, by whomever."""
        self._move(completed=cells)


def arrow(before: float | None, after: float | None) -> str:
    """Two rates in 0..1, for people."""
    if before is None or after is None:
        return "not measured"
    return f"{100 * before:.2f} -> {100 * after:.2f} %"
