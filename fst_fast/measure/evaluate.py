"""Clean accuracy, attack success and robust accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, fx, nn

from ..data.batches import (
    AUTOCAST,
    Batches,
    Loader,
    autocast,
    dtype_of,
    memory_layout,
    resolve_device,
    resolve_precision,
)
from ..data.device_loader import DeviceLoader
from ..heads.contexts import evaluating
from ..heads.output import logits_of
from ..triggers import Trigger
from ..triggers.pixels import Normalization, named_normalization, pixel_range
from .arguments import check, told_if_unfit
from .fold_batchnorm import cast_once, folded
from .triggered_batches import show

# Told the trigger's name (None: the images as they are), labels [B] and predicted classes [B].
Watch = Callable[[str | None, Tensor, Tensor], None]


@dataclass(frozen=True)
class Metrics:
    """The rates that :func:`evaluate` measured, all in 0..1.

    Attributes:
        clean_accuracy: share of images classified as their label.
        attack_success: share of triggered images of other classes classified as the target; None
            where no trigger was given, or no image of another class came: not measured.
        robust_accuracy: share of the same triggered images still classified as their label.
        images: how many clean images were classified.
        triggered_images: how many triggered images of other classes were classified.

    Example:
        >>> print(fst_fast.Metrics(0.9, 0.05, 0.85, images=100, triggered_images=90))
        clean accuracy 90.00 % of 100; attack success 5.00 %, robust accuracy 85.00 % of 90
    """

    clean_accuracy: float
    attack_success: float | None
    robust_accuracy: float | None
    images: int
    triggered_images: int

    def __str__(self) -> str:
        clean = f"clean accuracy {100 * self.clean_accuracy:.2f} % of {self.images}"
        if self.attack_success is None or self.robust_accuracy is None:
            return f"{clean}; attack success not measured"
        return (
            f"{clean}; attack success {100 * self.attack_success:.2f} %, robust accuracy "
            f"{100 * self.robust_accuracy:.2f} % of {self.triggered_images}"
        )


@overload
def evaluate(
    model: nn.Module,
    loader: Loader,
    trigger: Trigger | None = None,
    target: int = 0,
    *,
    normalize: Normalization | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
) -> Metrics: ...


@overload
def evaluate(
    model: nn.Module,
    loader: Loader,
    trigger: Mapping[str, Trigger],
    target: int = 0,
    *,
    normalize: Normalization | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
) -> dict[str, Metrics]: ...


def evaluate(
    model: nn.Module,
    loader: Loader,
    trigger: Trigger | Mapping[str, Trigger] | None = None,
    target: int = 0,
    *,
    normalize: Normalization | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
) -> Metrics | dict[str, Metrics]:
    """Classify every image once as it is and, for each trigger, once triggered.

    Counts stay on the device until the end. The model runs in eval mode, batch norm folded into its
    convolutions where it can be (:func:`~fst_fast.measure.fold_batchnorm.folded`), and is left as
    it was. On a GPU small batches are joined into large ones.

    Args:
        model: any image classifier.
        loader: (images [B, C, H, W] float, labels [B] integer), without random augmentation, and
            in the dataset's order for a trigger that goes by each image's number.
        trigger: put on the stored bytes, which are recovered from the images by ``normalize``; or
            several by name, for which the images as they are are classified only once.
        target: the attacker's class; its own images do not count towards attack success.
        normalize: the (mean, std) per channel, in units of 0..1, that the loader's images were
            normalised with; None takes it from a DeviceLoader, or else means 0..1.
        device: None takes the model's GPU, else any GPU, else the CPU.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where the device has instructions for
            it, else fp16 on a GPU and fp32 on a CPU.
    Returns:
        The metrics; of several triggers by their names.
    Raises:
        ValueError: an empty loader, bad batches, a target that is no class, no trigger in a
            mapping, or ``normalize`` does not turn the images into pixels.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        >>> batches = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))]
        >>> metrics = fst_fast.evaluate(model, batches, fst_fast.triggers.BadNets(), target=0)
        >>> metrics.images, metrics.triggered_images
        (4, 2)
    """
    if isinstance(trigger, Mapping):
        named = dict(trigger)
        if not named:
            raise ValueError(
                "evaluate: trigger must name at least one trigger, got an empty mapping"
            )
    else:
        named = {} if trigger is None else {"": trigger}
    target = check(model, named, target)
    normalize = named_normalization(normalize)
    place = resolve_device(device, model)
    batches = Batches(loader, 1, "evaluate: loader", at_once=True)
    if normalize is None and isinstance(loader, DeviceLoader):
        normalize = loader.normalize
    kind = resolve_precision(precision, place, dtype_of(model))
    found = measure(model, batches, place, kind, named, target, normalize)
    return found if isinstance(trigger, Mapping) else found[""]


def measure(
    model: nn.Module,
    batches: Batches,
    device: torch.device,
    precision: str,
    triggers: Mapping[str, Trigger] | None = None,
    target: int = 0,
    normalize: Normalization | None = None,
    watch: Watch | None = None,
    fold: bool = True,
) -> dict[str, Metrics]:
    """:func:`evaluate` on batches that are open already, with device and precision resolved.

    Args:
        watch: called after every classified batch, with tensors on the device.
        fold: fold batch norm, which takes its time first, and saves some with each image.
    Returns:
        The metrics by the triggers' names; without any, those of the name "".
    """
    # inference_mode would spoil what a model caches in its first forward for later training.
    with evaluating(model, device), torch.no_grad():
        named = triggers or {}
        run = _Pass(model, device, precision, named, target, normalize, watch, fold)
        for images, labels, triggered in show(batches, list(named.values()), normalize, device):
            run.add(images, labels, triggered)
    return run.metrics(batches.where)


class _Pass:
    """One pass over the data; everything it counts stays on the device until metrics()."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: str,
        triggers: Mapping[str, Trigger],
        target: int,
        normalize: Normalization | None,
        watch: Watch | None,
        fold: bool,
    ) -> None:
        self.watch, self.fold = watch, fold
        self.model, self.device, self.precision = model, device, precision
        self.triggers, self.target, self.normalize = triggers, target, normalize
        self.dtype = dtype_of(model)
        self.layout: torch.memory_format | None = None
        # This gives what the model gives, and is faster where that can be had.
        self.runs = model
        self.classes = 0
        self.images = 0
        # The model takes so many images at once; fewer once the memory has not sufficed.
        self.at_once = 2**31
        # [correct, of other classes than the target]
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        # Each trigger has a row: [attacked, robust].
        self.triggered = torch.zeros(len(triggers), 2, dtype=torch.int64, device=device)
        self.labels_seen = torch.tensor([0, 0], device=device)  # [least, greatest]

    def add(self, images: Tensor, labels: Tensor, triggered: Callable[[int], Tensor]) -> None:
        if self.layout is None:
            self._start(images)
        predicted = self._classify(images)
        if self.watch is not None:
            self.watch(None, labels, predicted)
        others = labels != self.target
        self.counts[0] += (predicted == labels).sum()
        self.counts[1] += others.sum()
        low, high = labels.aminmax()
        self.labels_seen[0].clamp_(max=low)
        self.labels_seen[1].clamp_(min=high)
        for t, (name, counts) in enumerate(zip(self.triggers, self.triggered, strict=True)):
            predicted = self._classify(triggered(t))
            if self.watch is not None:
                self.watch(name, labels, predicted)
            counts[0] += (others & (predicted == self.target)).sum()
            counts[1] += (others & (predicted == labels)).sum()
        self.images += len(labels)

    def _start(self, images: Tensor) -> None:
        """Look at the first batch: the layout, and whether it can be turned into pixels."""
        few = images[:2].to(self.dtype)
        self.layout = memory_layout(self.model, few)
        if self.fold:
            self.runs = folded(self.model, few.contiguous(memory_format=self.layout))
        if isinstance(self.runs, fx.GraphModule) and self.runs is not self.model:
            cast_once(self.runs, AUTOCAST.get(self.precision, torch.float32), self.layout)
        if self.triggers:
            low, high = (v.item() for v in pixel_range(images, self.normalize))
            if low < -0.01 or high > 1.01:
                raise ValueError(
                    "evaluate: normalize must turn the loader's images back into pixels in 0..1, "
                    f"got {low:.2f}..{high:.2f} with normalize={self.normalize}; pass the (mean, "
                    "std) that the loader normalises with"
                )

    def _classify(self, images: Tensor) -> Tensor:
        """The predicted class of each image, [B] int64; in parts where all at once take too much.

        Batches are made large for the device's sake, not for the loader's: :func:`show`.
        """
        while True:
            try:
                parts = [self._predicted(part) for part in images.split(self.at_once)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except torch.OutOfMemoryError:
                rows = min(self.at_once, len(images))
                if rows == 1:
                    raise
                self.at_once = rows // 2

    def _predicted(self, images: Tensor) -> Tensor:
        assert self.layout is not None
        with autocast(self.device, self.precision):
            placed = images.to(self.dtype).contiguous(memory_format=self.layout)
            with told_if_unfit(placed, first=self.images == 0):
                output = self.runs(placed)
        logits = logits_of(output)
        size = list(logits.shape)
        if size[:1] != [len(images)] or len(size) < 2 or any(n != 1 for n in size[2:]):
            raise ValueError(
                f"evaluate: model must return logits [{len(images)}, classes], one row per image, "
                f"got {size}; wrap a model of another kind in one that does"
            )
        self.classes = size[1]
        return logits.flatten(1).argmax(dim=1)

    def metrics(self, where: str) -> dict[str, Metrics]:
        low, high = self.labels_seen.tolist()
        seen = ((where, low, high), ("evaluate: target", self.target, self.target))
        for name, least, greatest in seen:
            if least < 0 or greatest >= self.classes:
                wrong = least if least < 0 else greatest
                raise ValueError(
                    f"{name} must hold classes in 0..{self.classes - 1}, as the model "
                    f"has {self.classes}, got {wrong}; check the label mapping"
                )
        correct, others = self.counts.tolist()
        accuracy = correct / self.images
        if not self.triggers:
            return {"": Metrics(accuracy, None, None, self.images, 0)}
        return {
            name: Metrics(
                clean_accuracy=accuracy,
                attack_success=attacked / others if others else None,
                robust_accuracy=robust / others if others else None,
                images=self.images,
                triggered_images=others,
            )
            for name, (attacked, robust) in zip(self.triggers, self.triggered.tolist(), strict=True)
        }
