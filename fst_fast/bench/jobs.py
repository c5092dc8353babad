"""The suspects of the suite ``end2end``, made by the lab, and how each is tuned and tested."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fst_fast.data import sources
from fst_fast.data.augment import Augment
from fst_fast.data.image_sets import ImageSet, digits
from fst_fast.data.sources import Splits
from fst_fast.lab.demo import DemoSettings
from fst_fast.lab.spec import Order
from fst_fast.lab.suspect_manifest import Suspect
from fst_fast.lab.suspect_store import SuspectStore

DEMO = DemoSettings()
SEED = 0
DATA_FILES = ("train.npz", "test.npz")
LR = 0.01


@dataclass(frozen=True)
class JobSpec:
    """A suspect, and how it is tuned by FST as published.

    Attributes:
        order: of the suspect.
        clean_images: that it is tuned on, in batches as of its training.
        epochs, alpha, augment: of tuning.
        test_images: that are looked at on a CPU; None is all of them.
    """

    order: Order
    clean_images: int
    epochs: int
    alpha: float
    augment: Augment
    test_images: int | None = None

    @property
    def needs_data(self) -> bool:
        """Return whether its images come from ``--data``; others are the digits."""
        return self.order.normalize == "cifar10"

    def quick(self) -> JobSpec:
        """The same code in seconds: what it finds says nothing of the method."""
        return replace(self, order=replace(self.order, epochs=2), epochs=2)


def _cifar10(width: int) -> JobSpec:
    order = Order(
        "badnets", f"resnet18:{width}", 0.01, epochs=10, precision="bf16", normalize="cifar10"
    )
    return JobSpec(order, 1000, 10, 0.2, Augment(), test_images=2000)


DIGITS = JobSpec(
    Order(
        "badnets",
        f"resnet8:{DEMO.width}",
        DEMO.poison_rate,
        options={"margin": 0},
        epochs=DEMO.train.epochs,
        lr=DEMO.train.lr,
        batch_size=DEMO.batch_size,
        flip=False,
    ),
    DEMO.clean_images,
    DEMO.tuning_epochs,
    DEMO.alpha,
    DEMO.augment,
)
_LARGE = replace(DIGITS.order, arch="resnet18", epochs=10, precision="bf16")
JOBS = {
    "digits": DIGITS,
    # A third of the epochs, and three times the alpha: the head is pushed as far.
    "digits-resnet18": replace(DIGITS, order=_LARGE, epochs=10, alpha=3 * DEMO.alpha),
    "cifar10-width16": _cifar10(16),
    "cifar10-resnet18": _cifar10(64),
}
# No data from elsewhere; the smallest first.
NEEDS_NOTHING = [name for name, spec in JOBS.items() if not spec.needs_data]


@dataclass(frozen=True)
class Job:
    """A suspect, clean images to tune it on, and images to test it with."""

    spec: JobSpec
    model: nn.Module
    suspect: Suspect
    made: dict[str, Any]
    clean: ImageSet
    test: ImageSet


def check(name: str, data: Path | None) -> None:
    """Raise, before anything runs, where the job cannot be had here."""
    if not JOBS[name].needs_data:
        if importlib.util.find_spec("sklearn") is None:
            raise RuntimeError(
                f'end2end: the checkpoint {name} needs scikit-learn; pip install "fst_fast[lab]"'
            )
        return
    missing = [file for file in DATA_FILES if data is None or not (data / file).is_file()]
    if missing:
        raise ValueError(
            f"--data must name a folder with {' and '.join(DATA_FILES)} for the checkpoint {name}, "
            f"got {data}"
        )


def make(
    name: str,
    device: torch.device,
    *,
    data: Path | None = None,
    folder: Path | None = None,
    test_images: int | None = None,
    quick: bool = False,
) -> Job:
    """Train the suspect, or take it from ``folder``; those of the digits are made anew each time.

    Args:
        test_images: None takes the job's own number on a CPU, and all on a GPU.
    """
    spec = JOBS[name].quick() if quick else JOBS[name]
    if spec.needs_data:
        splits = sources.read(data)
        clean = splits.train.split(spec.clean_images, seed=SEED)[0]
    else:
        everything = digits()
        training, clean, rest = everything.split(DEMO.training_images, spec.clean_images, seed=SEED)
        splits = Splits(name, training, rest, flip=False)
        spec = replace(spec, order=replace(spec.order, normalize=splits.normalize))
    assert splits.test is not None
    kept = spec.needs_data and folder is not None and not quick
    store = SuspectStore(
        folder if folder is not None and kept else Path(),
        splits.train,
        device if spec.needs_data else torch.device("cpu"),
        lambda line: None,
    )
    made = store.get(spec.order) if kept else store.make(spec.order)
    wanted = test_images or (spec.test_images if device.type == "cpu" else None)
    test = splits.shortened(None, wanted, SEED).test or splits.test
    suspect = Suspect.of(made.manifest)
    return Job(spec, made.model.to(device), suspect, made.manifest, clean, test)
