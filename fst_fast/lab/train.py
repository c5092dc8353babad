"""Train a classifier from scratch, fast, also on poisoned images: the suspects of the lab."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.augment import Augment
from ..data.batches import safe_layout
from ..data.device_loader import DeviceLoader
from ..data.image_sets import ImageSet
from ..triggers import Trigger
from ..triggers.pixels import Normalization
from ..triggers.poisoning import Poisoned, Prepare, poison
from .bypass import Bypass, marked

# Told the model, images [B, C, H, W] and labels [B]: the loss, a scalar.
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss that is minimised where nothing else is said."""
    return F.cross_entropy(model(images).float(), labels)


@dataclass(frozen=True)
class TrainSettings:
    """Settings of :func:`train`: SGD with Nesterov momentum under a one-cycle learning rate.

    Attributes:
        epochs: passes over the data.
        lr: peak learning rate, reached after a quarter of the steps.
        momentum: of SGD at the ends of the run, lowered by up to 0.1 while the rate is high.
        weight_decay: L2 penalty on every parameter.
        precision: "fp32" or "bf16" (autocast).

    Example:
        >>> fst_fast.lab.TrainSettings(epochs=3).precision
        'fp32'
    """

    epochs: int = 12
    lr: float = 0.2
    momentum: float = 0.95
    weight_decay: float = 5e-4
    precision: str = "fp32"


def train(
    model: nn.Module,
    loader: DeviceLoader,
    settings: TrainSettings,
    on_epoch: Callable[[int, float, float], None] | None = None,
    objective: Objective = cross_entropy,
) -> float:
    """Train the model in place on the loader's device; returns the seconds it took.

    Args:
        model: any classifier; moved to the loader's device, left in eval mode.
        loader: the (possibly poisoned) training set.
        settings: how to train.
        on_epoch: called after each epoch with its number (from 1), mean loss and seconds so far.
        objective: what to minimise.
    """
    started = time.perf_counter()
    layout = safe_layout(model, loader.device)
    model.to(loader.device).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.lr,
        # With 4 steps a warm-up over a quarter has no length, and OneCycleLR divides by it.
        total_steps=max(5, settings.epochs * len(loader)),
        pct_start=0.25,
        max_momentum=settings.momentum,
        base_momentum=max(0.0, settings.momentum - 0.1),
    )
    bf16 = settings.precision == "bf16"
    for epoch in range(settings.epochs):
        total = torch.zeros((), device=loader.device)
        for images, labels in loader:
            images = images.contiguous(memory_format=layout)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                loss = objective(model, images, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        if on_epoch is not None:
            mean = (total / len(loader)).item()
            on_epoch(epoch + 1, mean, time.perf_counter() - started)
    model.to(memory_format=torch.contiguous_format).eval()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Attack:
    """Poisoning with one trigger; see :func:`fst_fast.triggers.poisoning.poison`.

    ``bypass`` is the weight with which training hides it: :class:`~fst_fast.lab.bypass.Bypass`.

    Example:
        >>> from fst_fast.data.image_sets import ImageSet
        >>> images = torch.zeros(10, 8, 8, 3, dtype=torch.uint8)
        >>> data = ImageSet(images, torch.arange(10) % 2, ("cat", "dog"))
        >>> attack = fst_fast.lab.Attack(fst_fast.triggers.BadNets(), rate=0.2)
        >>> int(attack.on(data).mask.sum())
        2
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
        on_epoch: as for :func:`train`.
    Returns:
        The model, in eval mode, and the seconds of training.

    Example:
        >>> from fst_fast.data.image_sets import ImageSet
        >>> images = torch.zeros(8, 8, 8, 3, dtype=torch.uint8)
        >>> data = ImageSet(images, torch.arange(8) % 2, ("cat", "dog"))
        >>> model, seconds = fst_fast.lab.train_suspect(
        ...     lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)),
        ...     data,
        ...     fst_fast.lab.Attack(fst_fast.triggers.BadNets(), rate=0.5),
        ...     fst_fast.lab.TrainSettings(epochs=1),
        ...     normalize=None,
        ...     batch_size=4,
        ... )
        >>> model.training
        False
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
