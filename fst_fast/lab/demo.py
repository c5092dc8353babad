"""The demo: backdoor a small network on handwritten digits, then try to get rid of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..data.augment import Augment
from ..data.device_loader import DeviceLoader
from ..data.image_sets import ImageSet, digits
from ..measure.evaluate import Metrics, evaluate
from ..measure.png_figure import png_figure
from ..methods import Method
from ..methods.fst import FST
from ..methods.ft import FT
from ..triggers import BadNets, Trigger
from ..triggers.pixels import Normalization
from ..tuning.purify import purify
from ..tuning.result import PurifyResult
from .models import resnet8
from .train import Attack, TrainSettings, train_suspect


@dataclass(frozen=True)
class DemoSettings:
    """The demo's settings, chosen once and used for every seed.

    Attributes:
        training_images: of the suspect model; ``poison_rate`` of them carry the trigger.
        clean_images: what the defender has.
        target: the attacker's class.
        batch_size: of training and tuning.
        tuning_epochs, lr: of both methods.
        alpha: of FST.
    """

    training_images: int = 1000
    clean_images: int = 400
    poison_rate: float = 0.1
    target: int = 0
    width: int = 16
    train: TrainSettings = field(default_factory=lambda: TrainSettings(epochs=20, lr=0.1))
    batch_size: int = 64
    tuning_epochs: int = 30
    lr: float = 0.01
    alpha: float = 0.07
    trigger: Trigger = field(default_factory=BadNets)
    augment: Augment = field(default_factory=lambda: Augment(pad=2, flip=False))


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table."""

    name: str
    metrics: Metrics
    seconds: float


def run_demo(seed: int = 0, out: Path | str = "out", settings: DemoSettings | None = None) -> int:
    """Train, purify with FT and FST, print the table, save the picture and FST's report.

    Args:
        seed: of the split, the poisoning, the training and the tuning.
        out: folder for ``demo-seed<seed>.png`` and ``report-seed<seed>.html``.
    Returns:
        0 where FT kept the backdoor and FST removed it at a small cost, as the demo is there to
        show; 1 where it came out otherwise.
    """
    settings = settings or DemoSettings()
    console = Console()
    started = time.perf_counter()
    data = digits()
    normalize = data.statistics()
    training, clean, test = data.split(settings.training_images, settings.clean_images, seed=seed)
    console.print(
        f"digits: {len(training)} training images, {settings.poison_rate:.0%} of them poisoned "
        f"(a {settings.trigger.describe()['name']} trigger, label {settings.target}); "
        f"{len(clean)} clean images for the defender; {len(test)} test images",
        highlight=False,
    )
    attack = Attack(settings.trigger, settings.poison_rate, settings.target)
    suspect, seconds = train_suspect(
        lambda: resnet8(num_classes=10, width=settings.width),
        training,
        attack,
        settings.train,
        normalize=normalize,
        augment=settings.augment,
        batch_size=settings.batch_size,
        seed=seed,
    )
    test_loader = DeviceLoader(test.images, test.labels, 500, shuffle=False, normalize=normalize)
    rows = [DemoRow("before", _measure(suspect, test_loader, settings), seconds)]
    for name, method in (("FT", FT()), ("FST", FST(alpha=settings.alpha))):
        result = _tune(suspect, clean, normalize, method, settings, seed)
        rows.append(DemoRow(name, _measure(result.model, test_loader, settings), result.seconds))
    console.print(_table(rows))
    path = Path(out) / f"demo-seed{seed}.png"
    save_picture(path, test, settings.trigger, rows)
    page = path.with_name(f"report-seed{seed}.html")
    result.report(
        page,
        test=test_loader,
        suspect=suspect,
        trigger=settings.trigger,
        target=settings.target,
        classes=data.classes,
        device="cpu",
    )
    console.print(f"picture: {path}   report of FST: {page}", highlight=False)
    console.print(f"whole demo: {time.perf_counter() - started:.0f} s", highlight=False)
    return _verdict(rows, console)


def _tune(
    suspect: nn.Module,
    clean: ImageSet,
    normalize: Normalization,
    method: Method,
    settings: DemoSettings,
    seed: int,
) -> PurifyResult:
    loader = DeviceLoader(
        clean.images,
        clean.labels,
        settings.batch_size,
        seed=seed,
        augment=settings.augment,
        normalize=normalize,
    )
    return purify(
        suspect,
        loader,
        method=method,
        epochs=settings.tuning_epochs,
        lr=settings.lr,
        seed=seed,
        device="cpu",
        # The suspect was trained here, on these labels.
        check=False,
    )


def _measure(model: nn.Module, loader: DeviceLoader, settings: DemoSettings) -> Metrics:
    return evaluate(model, loader, settings.trigger, settings.target, device="cpu")


def _table(rows: list[DemoRow]) -> Table:
    table = Table("model", "clean accuracy", "attack success", "robust accuracy", "seconds")
    for row in rows:
        rates = (
            row.metrics.clean_accuracy,
            row.metrics.attack_success,
            row.metrics.robust_accuracy,
        )
        cells = ["-" if rate is None else f"{100 * rate:.1f} %" for rate in rates]
        table.add_row(row.name, *cells, f"{row.seconds:.1f}")
    return table


def _verdict(rows: list[DemoRow], console: Console) -> int:
    before, ft, fst = (row.metrics for row in rows)
    lost = before.clean_accuracy - fst.clean_accuracy
    shown = (ft.attack_success or 0) >= 0.8 and (fst.attack_success or 0) <= 0.05 and lost <= 0.03
    if shown:
        console.print("fine-tuning kept the backdoor; FST removed it", highlight=False)
    else:
        console.print(
            "this run does not show what the demo is meant to show (FT >= 80 %, FST <= 5 % attack "
            "success, at most 3 points of accuracy lost)",
            highlight=False,
        )
    return 0 if shown else 1


def save_picture(path: Path, test: ImageSet, trigger: Trigger, rows: list[DemoRow]) -> None:
    """Clean and triggered samples above bars of accuracy and attack success.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    figure = png_figure("demo", 9, 5.5)
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 1.5))
    samples, bars = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    samples.suptitle("stored images: clean above, triggered below")
    images = test.images[:8]
    axes = samples.subplots(2, 8)
    for column, (clean, triggered) in enumerate(zip(images, trigger.apply(images), strict=True)):
        _show(axes[0, column], clean)
        _show(axes[1, column], triggered)
    axis = bars.subplots()
    names = [row.name for row in rows]
    accuracy = [100 * row.metrics.clean_accuracy for row in rows]
    success = [100 * (row.metrics.attack_success or 0) for row in rows]
    for offset, label, values in (
        (-0.2, "clean accuracy", accuracy),
        (0.2, "attack success", success),
    ):
        drawn = axis.bar([i + offset for i in range(len(rows))], values, 0.38, label=label)
        axis.bar_label(drawn, fmt="%.1f")
    axis.set_xticks(range(len(rows)), names)
    axis.set_ylim(0, 108)
    axis.set_ylabel("%")
    bars.legend(loc="outside upper center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _show(axis: Any, image: Tensor) -> None:
    axis.imshow(image.numpy())
    axis.set(xticks=[], yticks=[])  # the frame stays: a white trigger ends at it
