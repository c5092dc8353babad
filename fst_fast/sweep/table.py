"""The lab's table of evidence: the grid of suspects made to order, each method and each seed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..data.augment import Augment
from ..data.device_loader import DeviceLoader
from ..data.sources import Splits
from ..lab.attack_metrics import measure_attack, rating, reactivated, woken
from ..lab.attacks import CLEAN
from ..lab.spec import Order
from ..lab.suspect_manifest import Suspect
from ..lab.suspect_store import SuspectStore
from ..measure.evaluate import Metrics
from .choice import NOTHING, UNHARMED, Choice
from .grid import Cell, Done, Grid
from .presets import DEVELOPED
from .store import Record, Row


@dataclass(frozen=True)
class TablePlan:
    """The contents of a table.

    Attributes:
        orders: the suspects; a clean model is among them.
        choices: the methods.
        seeds: of each purification, 0, 1, ...
        epochs, batch_size: of tuning.
        clean_images: the defender's, drawn from the training images as they were.
        queries: whether reactivation by queries (QRA) is tried as well.
        precision, threads: of tuning and measuring.
    """

    orders: tuple[Order, ...]
    choices: tuple[Choice, ...]
    seeds: int
    epochs: int
    batch_size: int
    clean_images: int
    queries: bool
    precision: str
    threads: int

    def cells(self) -> Iterator[Cell]:
        """Yield each suspect as it is, then under each method, last the clean model's answer."""
        for order in self.orders:
            title = f"{order.attack} {100 * order.rate:g}%" if order.rate else "clean"
            yield Cell(title, order, Choice(NOTHING))
            for choice in self.choices:
                if choice.name != NOTHING:
                    yield from (Cell(title, order, choice, seed) for seed in range(self.seeds))
            if order.attack != CLEAN:
                yield Cell(title, order, Choice(UNHARMED))

    def facts(self, splits: Splits) -> dict[str, Any]:
        """Return the facts in which two runs of a table agree; ``computed`` is the first one's."""
        numbers = ("seeds", "epochs", "batch_size", "clean_images", "queries")
        return {
            **{name: getattr(self, name) for name in numbers},
            "suspects": {cell.title: asdict(cell.suspect) for cell in self.cells()},
            "methods": [Cell("", None, choice).facts for choice in self.choices],
            "train": splits.train.describe(),
            "test": None if splits.test is None else splits.test.describe(),
            "computed": {"precision": self.precision, "threads": self.threads},
        }


class EvidenceTable(Grid):
    """Does a plan's cells on suspects of the lab; the record says how it is computed."""

    command = "lab table"
    store: Record

    def __init__(
        self, plan: TablePlan, splits: Splits, suspects: SuspectStore, record: Record
    ) -> None:
        super().__init__()
        assert splits.test is not None
        self.plan, self.suspects, self.store = plan, suspects, record
        self.test, self.device = splits.test, suspects.device
        self.cells = tuple(plan.cells())
        self.clean = splits.train.split(min(plan.clean_images, len(splits.train)), seed=0)[0]
        computed = record.content["settings"]["computed"]
        self.precision, self.threads = computed["precision"], computed["threads"]
        self.settings = {
            "epochs": plan.epochs,
            "device": self.device,
            "precision": self.precision,
            "threads": self.threads if self.device.type == "cpu" else None,
            # Whatever a suspect of the lab answers, the labels are its own.
            "check": False,
        }
        self._known: dict[str, Suspect] = {}
        self._controls: dict[str, Row] = {}

    def model(self, cell: Cell) -> nn.Module:
        made = self.suspects.get(cell.suspect)
        developed = (cell.suspect.attack, cell.suspect.rate, cell.suspect.arch) in DEVELOPED
        self.store.begin(cell.title, {**made.manifest, "developed": developed})
        self._known[cell.title] = Suspect.of(made.manifest)
        return self._clean_model if cell.choice.name == UNHARMED else made.model

    def head(self, cell: Cell) -> tuple[str | None, str]:
        return None, cell.suspect.arch

    def loader(self, cell: Cell) -> DeviceLoader:
        suspect = self._known[cell.title]
        return DeviceLoader(
            self.clean.images,
            self.clean.labels,
            self.plan.batch_size,
            augment=Augment(flip=suspect.flip),
            normalize=suspect.normalize,
            seed=cell.seed or 0,
        )

    def measure(self, cell: Cell, model: nn.Module) -> Metrics:
        suspect = self._known[cell.title]
        return measure_attack(model, self.test, suspect, self.device, self.precision)

    def keep(self, done: Done) -> None:
        self.store.add(done.cell, {**done.cell.facts, **self._columns(done)})

    def _columns(self, done: Done) -> Row:
        assert done.model is not None
        assert done.before is not None
        assert done.after is not None
        row: Row = asdict(done.after)
        if done.cell.choice.name == NOTHING:
            return row
        if done.cell.choice.name == UNHARMED:
            # The same at every rate.
            attack = done.cell.suspect.attack
            if attack not in self._controls:
                self._controls[attack] = row | self._woken(done.cell, done.model)
            return self._controls[attack]
        assert done.result is not None
        return {
            **row,
            **self._woken(done.cell, done.model),
            "der": rating(done.before, done.after),
            "epochs": done.epochs,
            "seconds": done.result.seconds,
            "cosine": done.result.head_shift.cosine,
            "stopped": done.result.stopped,
        }

    def _woken(self, cell: Cell, model: nn.Module) -> Row:
        """The rates that the attacks on a model reach."""
        suspect, place = self._known[cell.title], (self.device, self.precision)
        if suspect.trigger is None or suspect.relabel == "all-to-all":
            return {}
        retuned = woken(model, self.clean, suspect, *place)
        row: Row = {"retuned": asdict(self.measure(cell, retuned))}
        if self.plan.queries:
            images = (self.clean, self.test)
            found = reactivated(model, retuned, self._clean_model, *images, suspect, *place)
            row["reactivated"] = found.rates()
        return row

    @functools.cached_property
    def _clean_model(self) -> nn.Module:
        clean = next(order for order in self.plan.orders if order.attack == CLEAN)
        return self.suspects.get(clean).model
