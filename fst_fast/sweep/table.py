"""The evidence: attacks x rates x methods x seeds, each cell written down as it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ..data.augment import Augment
from ..data.device_loader import DeviceLoader
from ..data.image_sets import ImageSet
from ..data.sources import Source
from ..lab.attack_metrics import measure, rating, reactivated, woken
from ..lab.attacks import CLEAN
from ..lab.spec import Order
from ..lab.suspect_manifest import Suspect
from ..lab.suspect_store import Workshop
from ..measure.evaluate import Metrics
from ..tuning.purify import purify
from .evidence import Evidence
from .presets import DEVELOPED, NOTHING, UNHARMED, Choice

RATES = ("clean_accuracy", "attack_success", "robust_accuracy")


@dataclass(frozen=True)
class Cell:
    """One purification of one suspect; ``seed`` is None where none is done."""

    choice: Choice
    seed: int | None

    def facts(self) -> dict[str, Any]:
        return {**self.choice.facts(), **({} if self.seed is None else {"seed": self.seed})}


@dataclass(frozen=True)
class Plan:
    """What a table consists of.

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

    def cells(self, order: Order) -> Iterator[Cell]:
        """Of a suspect; first what it is itself, last what the clean model makes of its trigger."""
        yield Cell(Choice(NOTHING), None)
        for choice in self.choices:
            if choice.name != NOTHING:
                yield from (Cell(choice, seed) for seed in range(self.seeds))
        if order.attack != CLEAN:
            yield Cell(Choice(UNHARMED), None)

    def computed(self, evidence: Evidence) -> Plan:
        """As the evidence was begun: precision and threads decide the last digits."""
        return replace(self, **evidence.content["settings"]["computed"])

    def facts(self, source: Source) -> dict[str, Any]:
        """In which two runs of one table agree; ``computed`` is the first one's."""
        return {
            "suspects": {title_of(order): asdict(order) for order in self.orders},
            "methods": [choice.facts() for choice in self.choices],
            "seeds": self.seeds,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "clean_images": self.clean_images,
            "queries": self.queries,
            "train": source.train.describe(),
            "test": None if source.test is None else source.test.describe(),
            "computed": {"precision": self.precision, "threads": self.threads},
        }


def title_of(order: Order) -> str:
    """As the table names it."""
    return f"{order.attack} {100 * order.rate:g}%" if order.rate else "clean"


def fill(
    plan: Plan, source: Source, workshop: Workshop, evidence: Evidence, tell: Callable[[str], None]
) -> None:
    """Do every cell that the evidence lacks.

    Raises:
        KeyboardInterrupt: Ctrl-C; the same call goes on behind the last whole cell.
    """
    assert source.test is not None
    clean = source.train.split(min(plan.clean_images, len(source.train)), seed=0)[0]
    bench = _Bench(plan, clean, source.test, workshop)
    for order in plan.orders:
        title = title_of(order)
        left = [cell for cell in plan.cells(order) if evidence.row(title, cell.facts()) is None]
        if not left:
            tell(f"{title}: done before")
            continue
        made = workshop.get(order)
        developed = (order.attack, order.rate, order.arch) in DEVELOPED
        evidence.begin(title, {**made.manifest, "developed": developed})
        suspect = Suspect.of(made.manifest)
        for cell in left:
            before = evidence.row(title, Cell(Choice(NOTHING), None).facts())
            row = {**cell.facts(), **bench.do(cell, made.model, suspect, before)}
            evidence.add(title, row)
            tell(f"{title} {told(row)}")


class _Bench:
    """Does cells, one after another."""

    def __init__(self, plan: Plan, clean: ImageSet, test: ImageSet, workshop: Workshop) -> None:
        self.plan, self.clean, self.test, self.workshop = plan, clean, test, workshop
        self.device = workshop.device
        self._unharmed: nn.Module | None = None
        self._controls: dict[str, dict[str, Any]] = {}

    def do(
        self, cell: Cell, model: nn.Module, suspect: Suspect, before: dict[str, Any] | None
    ) -> dict[str, Any]:
        """What the cell's method makes of the model; ``before`` is its row without any."""
        if before is None:
            return self._measured(model, suspect)
        if cell.choice.name == UNHARMED:
            # The same at every rate.
            if suspect.attack not in self._controls:
                self._controls[suspect.attack] = self._attacked(self._clean_model(), suspect)
            return self._controls[suspect.attack]
        model, row = self._purified(cell, model, suspect)
        row |= self._attacked(model, suspect)
        return {**row, "der": rating(_metrics(before), _metrics(row))}

    def _attacked(self, model: nn.Module, suspect: Suspect) -> dict[str, Any]:
        """The model's rates, and those that the attacks on it reach."""
        row = self._measured(model, suspect)
        if suspect.trigger is not None and suspect.relabel != "all-to-all":
            retuned = woken(model, self.clean, suspect, self.device, self.plan.precision)
            row["retuned"] = self._measured(retuned, suspect)
            if self.plan.queries:
                row["reactivated"] = self._queried(model, retuned, suspect)
        return row

    def _measured(self, model: nn.Module, suspect: Suspect) -> dict[str, Any]:
        return asdict(measure(model, self.test, suspect, self.device, self.plan.precision))

    def _purified(
        self, cell: Cell, model: nn.Module, suspect: Suspect
    ) -> tuple[nn.Module, dict[str, Any]]:
        assert cell.seed is not None
        loader = DeviceLoader(
            self.clean.images,
            self.clean.labels,
            self.plan.batch_size,
            augment=Augment(flip=suspect.flip),
            normalize=suspect.normalize,
            seed=cell.seed,
        )
        result = purify(
            model,
            loader,
            method=cell.choice.method(),
            epochs=self.plan.epochs,
            seed=cell.seed,
            device=self.device,
            precision=self.plan.precision,
            channels_last=True,
            threads=self.plan.threads if self.device.type == "cpu" else None,
            progress=False,
        )
        if result.stopped is not None and result.stopped.startswith("interrupted"):
            raise KeyboardInterrupt
        row = {"epochs": len(result.history), "seconds": result.seconds}
        return result.model, {**row, "cosine": result.head_shift.cosine, "stopped": result.stopped}

    def _queried(self, model: nn.Module, retuned: nn.Module, suspect: Suspect) -> dict[str, float]:
        images, place = (self.clean, self.test), (self.device, self.plan.precision)
        return reactivated(model, retuned, self._clean_model(), *images, suspect, *place).rates()

    def _clean_model(self) -> nn.Module:
        if self._unharmed is None:
            clean = next(order for order in self.plan.orders if order.attack == CLEAN)
            self._unharmed = self.workshop.get(clean).model
        return self._unharmed


def _metrics(row: dict[str, Any]) -> Metrics:
    return Metrics(**{name: row[name] for name in Metrics.__dataclass_fields__})


def told(row: dict[str, Any]) -> str:
    """One row in a line."""
    alpha = f" {row['alpha']:g}" if "alpha" in row else ""
    seed = f" seed {row['seed']}" if "seed" in row else ""
    seconds = f", {row['seconds']:.1f} s" if "seconds" in row else ""
    rates = ", ".join(
        f"{name.replace('_', ' ')} {100 * row[name]:.1f} %"
        for name in RATES
        if row[name] is not None
    )
    return f"{row['method']}{alpha}{seed}: {rates}{seconds}"
