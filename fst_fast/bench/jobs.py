"""The suspects of the suite ``end2end``, and what each is tuned and tested with."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fst_fast import checkpoints
from fst_fast.checkpoints.atomic_files import strict_json
from fst_fast.data import image_sets
from fst_fast.data.augment import Augment
from fst_fast.data.image_sets import ImageSet
from fst_fast.lab.demo import DemoSettings
from fst_fast.lab.models import resnet8, resnet18
from fst_fast.lab.train import Attack, TrainSettings, train_suspect
from fst_fast.triggers import BadNets
from fst_fast.triggers.pixels import Normalization

DEMO = DemoSettings()
SEED = 0
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
DATA_FILES = ("train.npz", "test.npz")


@dataclass(frozen=True)
class Plan:
    """How a suspect is made, and tuned by FST as published.

    Attributes:
        source: of the images, ``digits`` or ``cifar10``.
        clean_images: that it is tuned on.
        moved: augmentation while it is tuned.
        test_images: that are looked at on a CPU; None is all of them.
    """

    source: str
    architecture: str
    build: Callable[[], nn.Module]
    attack: Attack
    training: TrainSettings
    training_augment: Augment
    clean_images: int
    batch: int
    epochs: int
    lr: float
    alpha: float
    moved: Augment
    test_images: int | None = None
    training_images: int | None = None

    def made(self) -> dict[str, Any]:
        """What decides the suspect, as a record and a manifest say it."""
        attack = {**asdict(self.attack), "trigger": self.attack.trigger.describe()}
        return strict_json(
            {
                "architecture": self.architecture,
                "attack": attack,
                "training": asdict(self.training),
                "augment": asdict(self.training_augment),
                "training_images": self.training_images,
                "seed": SEED,
            },
            "made",
        )

    def quick(self) -> Plan:
        """The same code in seconds: what it finds says nothing of the method."""
        return replace(self, training=replace(self.training, epochs=2), epochs=2)


def _cifar10(width: int) -> Plan:
    return Plan(
        source="cifar10",
        architecture=f"resnet18 of width {width}",
        build=lambda: resnet18(num_classes=10, width=width),
        attack=Attack(BadNets(margin=2), 0.01),
        training=TrainSettings(epochs=10, lr=0.1, precision="bf16"),
        training_augment=Augment(pad=2),
        clean_images=1000,
        batch=128,
        epochs=10,
        lr=0.01,
        alpha=0.2,
        moved=Augment(),
        test_images=2000,
    )


DIGITS = Plan(
    source="digits",
    architecture=f"resnet8 of width {DEMO.width}",
    build=lambda: resnet8(num_classes=10, width=DEMO.width),
    attack=Attack(DEMO.trigger, DEMO.poison_rate, DEMO.target),
    training=DEMO.train,
    training_augment=DEMO.augment,
    clean_images=DEMO.clean_images,
    batch=DEMO.batch_size,
    epochs=DEMO.tuning_epochs,
    lr=DEMO.lr,
    alpha=DEMO.alpha,
    moved=DEMO.augment,
    training_images=DEMO.training_images,
)
PLANS = {
    "digits": DIGITS,
    # A third of the epochs, and three times the alpha: the head is pushed as far.
    "digits-resnet18": replace(
        DIGITS,
        architecture="resnet18 of width 64",
        build=lambda: resnet18(num_classes=10, width=64),
        training=replace(DEMO.train, epochs=10, precision="bf16"),
        epochs=10,
        alpha=3 * DEMO.alpha,
    ),
    "cifar10-width16": _cifar10(16),
    "cifar10-resnet18": _cifar10(64),
}
# No data from elsewhere; the smallest first.
NEEDS_NOTHING = [name for name, plan in PLANS.items() if plan.source == "digits"]


@dataclass(frozen=True)
class Job:
    """A suspect, clean images to tune it on, and images to test it with."""

    plan: Plan
    model: nn.Module
    clean: ImageSet
    test: ImageSet
    normalize: Normalization


def check(name: str, data: Path | None) -> None:
    """Raise, before anything runs, where the job cannot be had here."""
    if PLANS[name].source == "digits":
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
        test_images: None takes the plan's own number on a CPU, and all on a GPU.
    """
    plan = PLANS[name].quick() if quick else PLANS[name]
    if plan.source == "digits":
        everything = image_sets.digits()
        parts = everything.split(DEMO.training_images, plan.clean_images, seed=SEED)
        (training, clean, test), normalize = parts, everything.statistics()
        model = _trained(plan, training, normalize, torch.device("cpu"))
    else:
        assert data is not None
        training, test = (image_sets.npz(data / file) for file in DATA_FILES)
        normalize = CIFAR10
        clean = training.split(plan.clean_images, seed=SEED)[0]
        kept = None if folder is None or quick else folder / f"{name}.safetensors"
        model = _kept(plan, kept, lambda: _trained(plan, training, normalize, device))
    wanted = test_images or (plan.test_images if device.type == "cpu" else None)
    if wanted is not None and wanted < len(test):
        test = test.split(wanted, seed=SEED)[0]
    return Job(plan, model.to(device), clean, test, normalize)


def _trained(
    plan: Plan, data: ImageSet, normalize: Normalization, device: torch.device
) -> nn.Module:
    model, _ = train_suspect(
        plan.build,
        data,
        plan.attack,
        plan.training,
        normalize=normalize,
        augment=plan.training_augment,
        batch_size=plan.batch,
        seed=SEED,
        device=device,
    )
    return model


def _kept(plan: Plan, path: Path | None, train: Callable[[], nn.Module]) -> nn.Module:
    """The checkpoint at ``path``, trained and saved there if there is none.

    Raises:
        ValueError: it was made in another way.
    """
    if path is None:
        return train()
    if path.exists():
        manifest: Mapping[str, Any] = json.loads(path.with_suffix(".json").read_text())
        if manifest.get("made") != plan.made():
            raise ValueError(
                f"--checkpoints must hold suspects made as this version makes them, got {path} "
                "made otherwise; remove it, or name another folder"
            )
        return checkpoints.load(path, plan.build())
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.check_writable(path)
    model = train()
    checkpoints.save(path, model, {"made": plan.made()})
    return model
