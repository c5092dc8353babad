"""Several methods on one suspect, the same clean images and the same clock."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from .. import methods as known
from ..checkpoints.atomic_files import dump_json, read_object, replace_file
from ..data.batches import Loader
from ..heads.find import unwrap
from ..measure.evaluate import Metrics, evaluate
from ..measure.png_figure import png_figure
from ..methods import Method
from ..triggers import Trigger
from ..triggers.pixels import Normalization
from .arguments import check_model
from .progress import table_console
from .purify import purify
from .result import PurifyResult
from .resume import fingerprint, generators_of

ROW = "row.json"
# An accuracy of less than so many times a guess among all classes tells nothing.
_GUESS = 1.5
# These arguments of purify() are set for every method here.
_OWN = {"model", "loader", "method", "alpha", "resume", "callbacks", "inplace"}


@dataclass(frozen=True)
class Compared:
    """One method of a comparison.

    Attributes:
        method: its label.
        settings: of the run, as in :class:`PurifyResult`; empty where it failed.
        metrics: of the purified model; None where the method failed.
        epochs: that were run.
        seconds: of wall time.
        note: why it failed or was stopped, or that it ruined the model; else "".
        passes: of the model forward and backward, which a step takes for each image that it sees,
            as the method's ``cost`` tells; searches beside the steps are not among them.

    Example:
        >>> row = fst_fast.Compared("ft", {}, fst_fast.Metrics(0.9, 0.1, 0.8, 10, 9), 10, 2.5, "")
        >>> row.metrics.attack_success
        0.1
    """

    method: str
    settings: Mapping[str, Any]
    metrics: Metrics | None
    epochs: int
    seconds: float
    note: str
    passes: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`; as text it is a table.

    Attributes:
        suspect: measured before anything was done to it.
        rows: one for each method, in the order given; fewer after Ctrl-C.

    Example:
        >>> suspect = fst_fast.Metrics(0.9, 0.99, 0.01, images=100, triggered_images=90)
        >>> row = fst_fast.Compared("ft", {}, suspect, 10, 2.5, "")
        >>> "99.0 %" in str(fst_fast.Comparison(suspect, (row,)))
        True
    """

    suspect: Metrics
    rows: tuple[Compared, ...]

    def __str__(self) -> str:
        names = ("method", "clean accuracy", "attack success", "robust accuracy", "epochs")
        table = Table(*names, "passes an image", "seconds", "note")
        table.add_row("suspect", *_rates(self.suspect), "", "", "", "")
        for row in self.rows:
            passes = "" if row.passes is None else f"{row.passes:g}"
            costs = (str(row.epochs), passes, f"{row.seconds:.1f}")
            table.add_row(row.method, *_rates(row.metrics), *costs, row.note)
        console = table_console()
        with console.capture() as shown:
            console.print(table, highlight=False)
        return shown.get()

    def save(self, path: str | Path) -> None:
        """Write all of it as JSON."""
        data = {"suspect": asdict(self.suspect), "rows": [asdict(row) for row in self.rows]}
        replace_file(Path(path), dump_json(data))

    def plot(self, path: str | Path) -> None:
        """Draw accuracy lost against attack success left as a PNG file.

        Raises:
            ValueError: no attack was measured.
            RuntimeError: matplotlib is not installed.
        """
        if self.suspect.attack_success is None:
            raise ValueError("plot: comparison must have measured an attack; give compare() one")
        figure = png_figure("plot", 7, 5)
        axis = figure.subplots()
        named = [("suspect", self.suspect), *((row.method, row.metrics) for row in self.rows)]
        for name, metrics in named:
            if metrics is not None and metrics.attack_success is not None:
                lost = 100 * (self.suspect.clean_accuracy - metrics.clean_accuracy)
                place = (lost, 100 * metrics.attack_success)
                axis.plot(*place, "o", color="black" if name == "suspect" else "tab:blue")
                axis.annotate(name, place, xytext=(5, 4), textcoords="offset points")
        axis.set_xlabel("points of clean accuracy lost")
        axis.set_ylabel("attack success left, %")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        replace_file(Path(path), buffer.getvalue())


def compare(
    model: nn.Module,
    loader: Loader,
    *,
    test: Loader,
    methods: Sequence[str | Method] | Mapping[str, str | Method] | None = None,
    trigger: Trigger | None = None,
    target: int = 0,
    normalize: Normalization | None = None,
    folder: str | Path | None = None,
    **settings: Any,
) -> Comparison:
    """Purify copies of one suspect by several methods, and measure each.

    Every method sees the same batches of the same clean images; neither the trigger nor the test
    images are shown to it. A method that fails leaves the others alone.

    Args:
        model: the suspect, which is left as it is.
        loader: clean batches, as for :func:`fst_fast.purify`, but no one-shot iterator.
        test: images to measure on, as for :func:`fst_fast.evaluate`; iterated once a method.
        methods: names or :class:`~fst_fast.methods.Method` objects, or a mapping from labels to
            these; None takes every method that has a name.
        trigger, target, normalize: of the attack that is measured, as for evaluate(). Without a
            trigger, attack success is not measured.
        folder: keeps what is done: called again with the same arguments, compare() goes on there.
            It must be the folder of this comparison; the test images are not looked at.
        settings: further arguments of purify() for all methods, such as ``epochs`` and ``seed``.
    Returns:
        A :class:`Comparison`. After Ctrl-C it ends with the method that was stopped.
    Raises:
        ValueError: an argument is not as described; nothing was run.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> batches = [(torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))]
        >>> table = fst_fast.compare(
        ...     model, batches, test=batches, methods=["ft", "clp"], epochs=1, progress=False
        ... )
        >>> [(row.method, row.note[:34]) for row in table.rows]
        [('ft', ''), ('clp', 'clp: model must have a convolution')]
    """
    check_model(unwrap(model) if isinstance(model, nn.Module) else model, "compare")
    chosen = _labelled(methods)
    _check(loader, settings)
    common = {"device": settings.get("device"), "precision": settings.get("precision", "auto")}

    def measured(purified: nn.Module) -> Metrics:
        return evaluate(purified, test, trigger, target, normalize=normalize, **common)

    suspect = measured(model)
    attack = None if trigger is None else [trigger.describe(), target]
    asked = {"model": fingerprint(unwrap(model)), "attack": attack, "settings": settings}
    generators = [(g, g.get_state()) for g in generators_of(loader)]
    rows: list[Compared] = []
    for label, method in chosen.items():
        place = None if folder is None else Path(folder) / label
        wanted = json.loads(json.dumps({**asked, "method": method.settings()}, default=str))
        row = None if place is None else _kept(place / ROW, wanted)
        if row is None:
            for generator, state in generators:
                generator.set_state(state)
            try:
                result = purify(model, loader, method=method, alpha=None, resume=place, **settings)
                row = _row(label, result, measured(result.model), suspect)
            except (ValueError, RuntimeError) as error:
                row = Compared(label, {}, None, 0, 0.0, str(error))
            row = replace(row, passes=method.passes_per_image())
            if row.note.startswith("interrupted"):
                return Comparison(suspect, (*rows, row))
            if place is not None:
                _keep(place, wanted, row)
        rows.append(row)
    return Comparison(suspect, tuple(rows))


def _labelled(
    methods: Sequence[str | Method] | Mapping[str, str | Method] | None,
) -> dict[str, Method]:
    """The methods by their labels."""
    expected = "compare: methods must be names or methods, or a mapping from labels to these"
    if methods is None:
        methods = known.available()
    if isinstance(methods, str | Method) or not isinstance(methods, Mapping | Sequence):
        raise ValueError(f"{expected}, got {methods!r}; pass a list")
    if isinstance(methods, Mapping):
        pairs = list(methods.items())
    else:
        pairs = [(one.name if isinstance(one, Method) else one, one) for one in methods]
    if not pairs:
        raise ValueError(f"{expected}, got none; name one of {', '.join(known.available())}")
    out: dict[str, Method] = {}
    for label, one in pairs:
        if not isinstance(label, str) or not label or Path(label).name != label:
            raise ValueError(f"{expected}, got the label {label!r}; it names a folder")
        if label in out:
            raise ValueError(
                f"{expected}, got {label!r} twice; give each a label of its own in a mapping"
            )
        if not isinstance(one, str | Method):
            raise ValueError(f"{expected}, got {one!r}; pass a name or a Method")
        out[label] = known.get(one) if isinstance(one, str) else one
    return out


def _check(loader: object, settings: Mapping[str, Any]) -> None:
    if isinstance(loader, Iterator):
        raise ValueError(
            "compare: loader must be iterable once for each method, got a one-shot "
            f"{type(loader).__name__}; pass a DataLoader, a list of batches or a DeviceLoader"
        )
    takes = inspect.signature(purify).parameters.keys() - _OWN
    unknown = sorted(settings.keys() - takes)
    if unknown:
        raise ValueError(
            f"compare: settings must be arguments of purify(), got {', '.join(unknown)}; it takes "
            f"{', '.join(sorted(takes))}"
        )


def _kept(path: Path, wanted: Mapping[str, Any]) -> Compared | None:
    """The row that a file holds; None where there is none, or of another comparison."""
    found = read_object(path) if path.exists() else None
    if found is None or found.get("asked") != wanted:
        return None
    row = found["row"]
    metrics = None if row["metrics"] is None else Metrics(**row["metrics"])
    return Compared(**{**row, "metrics": metrics})


def _keep(place: Path, wanted: Mapping[str, Any], row: Compared) -> None:
    """Write a row for :func:`_kept`."""
    place.mkdir(parents=True, exist_ok=True)
    replace_file(place / ROW, dump_json({"asked": wanted, "row": asdict(row)}))


def _row(label: str, result: PurifyResult, metrics: Metrics, suspect: Metrics) -> Compared:
    """The row of a method that has run."""
    chance = _GUESS / len(result.head_shift.class_norms)
    note = result.stopped or ""
    if metrics.clean_accuracy < chance <= suspect.clean_accuracy:
        note = "; ".join(
            filter(None, [note, "the model is ruined: its accuracy is that of chance"])
        )
    # A run that was gone on with has its earlier seconds in the history alone.
    seconds = max([result.seconds, *(record.seconds for record in result.history[-1:])])
    settings = json.loads(json.dumps(dict(result.settings), default=str))
    return Compared(label, settings, metrics, len(result.history), seconds, note)


def _rates(metrics: Metrics | None) -> list[str]:
    if metrics is None:
        return ["failed", "", ""]
    rates = (metrics.clean_accuracy, metrics.attack_success, metrics.robust_accuracy)
    return ["not measured" if rate is None else f"{100 * rate:.1f} %" for rate in rates]
