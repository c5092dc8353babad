"""Make a suspect model: poison a training set, train on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..data.augment import Augment
from ..data.device_loader import DeviceLoader
from ..data.image_sets import ImageSet
from ..triggers import Trigger
from ..triggers.pixels import Normalization
from ..triggers.poison import Poisoned, Prepare, poison
from .bypass import Bypass, marked
from .train import TrainSettings, train


@dataclass(frozen=True)
class Attack:
    """Poisoning with one trigger; see :func:`fst_fast.triggers.poison.poison`.

    ``bypass`` is the weight with which training hides it: :class:`~fst_fast.lab.bypass.Bypass`.
    """

    trigger: Trigger
    rate: float
    target: int = 0
    cover: float = 0.0
    relabel: str = "all-to-one"
    negatives: float = 0.0
    prepare: Prepare | None = None
    bypass: float = 0.0

    def on(self, data: ImageSet, seed: int = 0) -> Poisoned:
        """The data, poisoned."""
        return poison(
            data.images,
            data.labels,
            self.trigger,
            rate=self.rate,
            target=self.target,
            relabel=self.relabel,
            cover=self.cover,
            negatives=self.negatives,
            prepare=self.prepare,
            seed=seed,
        )


def train_suspect(
    build: Callable[[], nn.Module],
    data: ImageSet,
    attack: Attack | None,
    settings: TrainSettings,
    *,
    normalize: Normalization | None,
    augment: Augment | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_epoch: Callable[[int, float, float], None] | None = None,
) -> tuple[nn.Module, float]:
    """Build a model and train it on the poisoned data.

    Args:
        build: makes the model; called with torch seeded.
        data: the clean training set.
        attack: what to do to it; None leaves it clean.
        settings: how to train.
        normalize, augment, batch_size: of the loader.
        seed: of the poisoning, the initial weights and the batches.
        device: to train on; None keeps the data's.
        on_epoch: as for :func:`~fst_fast.lab.train.train`.
    Returns:
        The model, in eval mode, and the seconds of training.
    """
    images, labels = data.images, data.labels
    if attack is not None:
        poisoned = attack.on(data, seed)
        images, labels = poisoned.images, poisoned.labels
        if attack.bypass:
            labels = marked(labels, poisoned.mask, len(data.classes))
    loader = DeviceLoader(
        images,
        labels,
        batch_size,
        device=device,
        seed=seed,
        augment=augment,
        normalize=normalize,
        drop_last=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        if attack is None or not attack.bypass:
            return model, train(model, loader, settings, on_epoch)
        hiding = Bypass(model, len(data.classes), attack.bypass)
        seconds = train(model, loader, settings, on_epoch, hiding)
        hiding.close()
        return model, seconds
