"""The order for a model: all that decides it, beside the images and the code."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..checkpoints.atomic_files import dump_json, strict_json
from ..data.augment import Augment
from ..data.batches import resolve_precision
from ..data.normalization import normalization
from ..triggers.pixels import Normalization
from .attacks import CLEAN, Recipe, recipe_of
from .models import Network, network
from .train import TrainSettings

# The lab's crops pad by half of the usual 4, so that badnets' square stays in the picture.
PAD = 2


def training_precision(precision: str, device: torch.device) -> str:
    """As asked for; "auto" is bf16 where the device has instructions for it: fp16 has no scaler."""
    resolved = resolve_precision(precision, device)
    return "fp32" if resolved == "fp16" and precision == "auto" else resolved


@dataclass(frozen=True)
class Order:
    """One backdoored model. None takes the attack's own, and is replaced by it.

    Attributes:
        attack: a name of :data:`fst_fast.lab.attacks.RECIPES`; "none" trains on clean images.
        arch: as of :func:`fst_fast.lab.models.network`.
        rate: poisoned share of the training set.
        target: the attacker's class.
        relabel: "all-to-one", "all-to-all" or "clean-label".
        options: of the trigger, in place of the recipe's.
        epochs, lr, batch_size, precision: of the training.
        flip: whether crops come with random flips, where the attack's recipe has any.
        normalize: of the images, as on the command line.
        seed: of poisoning, weights and batches.
        search: epochs of SIBA's search, or steps of label-consistent's perturbation.
    Raises:
        ValueError: an unknown attack or architecture, or a number out of its bounds.

    Example:
        >>> order = fst_fast.lab.Order("badnets", arch="resnet8", epochs=2)
        >>> order.rate, order.relabel
        (0.1, 'all-to-one')
    """

    attack: str
    arch: str = "resnet18:16"
    rate: float | None = None
    target: int = 0
    relabel: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    lr: float = 0.1
    batch_size: int = 128
    precision: str = "fp32"
    flip: bool = True
    normalize: str = "none"
    seed: int = 0
    search: int | None = None

    def __post_init__(self) -> None:
        recipe = self.recipe
        _ = self.network, self.normalization
        defaults = {"rate": recipe.rate, "relabel": recipe.relabel, "epochs": recipe.epochs}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, least in (("epochs", 1), ("batch_size", 1), ("target", 0), ("search", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"lab: {name} must be {least} or more, got {value}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lab: lr must be > 0, got {self.lr}; the default is 0.1")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"lab: precision must be fp32 or bf16, got {self.precision!r}")
        if self.attack == CLEAN and self.rate:
            raise ValueError(f"lab: rate must be left out for the attack {CLEAN!r}")

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.attack)

    @property
    def network(self) -> Network:
        return network(self.arch)

    @property
    def normalization(self) -> Normalization | None:
        return normalization(self.normalize)

    @property
    def training(self) -> TrainSettings:
        assert self.epochs is not None
        return TrainSettings(epochs=self.epochs, lr=self.lr, precision=self.precision)

    @property
    def augment(self) -> Augment | None:
        return Augment(PAD, self.flip) if self.recipe.crops else None

    def surrogate(self) -> Order:
        """The clean model on which the attack is worked out, of the same kind."""
        epochs = None if self.epochs == self.recipe.epochs else self.epochs
        clean: dict[str, Any] = {
            "attack": CLEAN,
            "rate": None,
            "relabel": None,
            "options": {},
            "target": 0,
        }
        return replace(self, **clean, epochs=epochs, search=None)

    def name(self, data: dict[str, object]) -> str:
        """A file's name: of two orders, or sets of images, that differ, another."""
        content = strict_json({"order": asdict(self), "data": data}, "order")
        digest = hashlib.sha256(dump_json(content)).hexdigest()[:10]
        return f"{self.attack}-{self.rate:g}-{digest}"
