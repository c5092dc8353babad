"""Clean accuracy, attack success and robust accuracy of a classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .data import DeviceLoader
from .heads import logits_of
from .inputs import (
    Batches,
    Loader,
    autocast,
    check_batch,
    memory_layout,
    resolve_device,
    resolve_precision,
)
from .pixels import Normalization, normalize_bytes, pixel_range, recover_bytes
from .state import evaluating
from .triggers import Trigger


@dataclass(frozen=True)
class Metrics:
    """What :func:`evaluate` measured, all rates in 0..1.

    Attributes:
        clean_accuracy: share of images classified as their label.
        attack_success: share of triggered images of other classes classified as the target; None
            where no trigger was given, or no image of another class came: not measured.
        robust_accuracy: share of the same triggered images still classified as their label.
        images: how many clean images were classified.
        triggered_images: how many triggered images of other classes were classified.
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


def evaluate(
    model: nn.Module,
    loader: Loader,
    trigger: Trigger | None = None,
    target: int = 0,
    *,
    normalize: Normalization | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
) -> Metrics:
    """Classify every image once as it is and, with a trigger, once triggered.

    Counts stay on the device until the end. The model runs in eval mode and is left as it was.

    Args:
        model: any image classifier.
        loader: (images [B, C, H, W] float, labels [B] integer), without random augmentation.
        trigger: put on the stored bytes, which are recovered from the images by ``normalize``.
        target: the attacker's class; its own images do not count towards attack success.
        normalize: the (mean, std) per channel, in units of 0..1, that the loader's images were
            normalised with; None takes it from a DeviceLoader, or else means 0..1.
        device: None takes the model's GPU, else any GPU, else the CPU.
        precision: "auto", "fp32", "bf16" or "fp16".
    Raises:
        ValueError: an empty loader, bad batches, a target that is no class, or ``normalize`` does
            not turn the images into pixels.
    """
    place = resolve_device(device, model)
    batches = Batches(loader, 1, "evaluate: loader")
    if normalize is None and isinstance(loader, DeviceLoader):
        normalize = loader.normalize
    kind = resolve_precision(precision, place)
    return measure(model, batches, place, kind, trigger, target, normalize)


def measure(
    model: nn.Module,
    batches: Batches,
    device: torch.device,
    precision: str,
    trigger: Trigger | None = None,
    target: int = 0,
    normalize: Normalization | None = None,
) -> Metrics:
    """:func:`evaluate` on batches that are open already, with device and precision resolved."""
    # Not inference_mode: what a model caches in its first forward must remain of use in training.
    with evaluating(model, device), torch.no_grad():
        run = _Pass(model, device, precision, trigger, target, normalize)
        for batch in batches.epoch(0):
            run.add(*check_batch(batch, batches.where, device))
    return run.metrics()


class _Pass:
    """One pass over the data; everything it counts stays on the device until metrics()."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: str,
        trigger: Trigger | None,
        target: int,
        normalize: Normalization | None,
    ) -> None:
        self.model, self.device, self.precision = model, device, precision
        self.trigger, self.target, self.normalize = trigger, target, normalize
        self.dtype = next((p.dtype for p in model.parameters()), torch.float32)
        self.layout: torch.memory_format | None = None
        self.classes = 0
        # [correct, images, attacked, robust, triggered]
        self.counts = torch.zeros(5, dtype=torch.int64, device=device)
        self.labels_seen = torch.tensor([0, 0], device=device)  # [least, greatest]

    def add(self, images: Tensor, labels: Tensor) -> None:
        # Not yet in the model's dtype: half precision may be too coarse to recover bytes from.
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, torch.int64, non_blocking=True)
        if self.layout is None:
            self._start(images)
        predicted = self._classify(images)
        self.counts[0] += (predicted == labels).sum()
        self.counts[1] += len(labels)
        low, high = labels.aminmax()
        self.labels_seen[0].clamp_(max=low)
        self.labels_seen[1].clamp_(min=high)
        if self.trigger is not None:
            triggered = self.trigger.apply(recover_bytes(images, self.normalize))
            predicted = self._classify(normalize_bytes(triggered, self.normalize))
            others = labels != self.target
            self.counts[2] += (others & (predicted == self.target)).sum()
            self.counts[3] += (others & (predicted == labels)).sum()
            self.counts[4] += others.sum()

    def _start(self, images: Tensor) -> None:
        """Look at the first batch: the layout, and whether it can be turned into pixels."""
        self.layout = memory_layout(self.model, images.to(self.dtype))
        if self.trigger is not None:
            low, high = (v.item() for v in pixel_range(images, self.normalize))
            if low < -0.01 or high > 1.01:
                raise ValueError(
                    "evaluate: normalize must turn the loader's images back into pixels in 0..1, "
                    f"got {low:.2f}..{high:.2f} with normalize={self.normalize}; pass the (mean, "
                    "std) that the loader normalises with"
                )

    def _classify(self, images: Tensor) -> Tensor:
        """The predicted class of each image, [B] int64."""
        assert self.layout is not None
        with autocast(self.device, self.precision):
            output = self.model(images.to(self.dtype).contiguous(memory_format=self.layout))
        logits = logits_of(output)
        size = list(logits.shape)
        if size[:1] != [len(images)] or len(size) < 2 or any(n != 1 for n in size[2:]):
            raise ValueError(
                f"evaluate: model must return logits [{len(images)}, classes], one row per image, "
                f"got {size}; wrap a model of another kind in one that does"
            )
        self.classes = size[1]
        return logits.flatten(1).argmax(dim=1)

    def metrics(self) -> Metrics:
        low, high = self.labels_seen.tolist()
        for name, least, greatest in (("loader", low, high), ("target", self.target, self.target)):
            if least < 0 or greatest >= self.classes:
                wrong = least if least < 0 else greatest
                raise ValueError(
                    f"evaluate: {name} must hold classes in 0..{self.classes - 1}, as the model "
                    f"has {self.classes}, got {wrong}; check the label mapping"
                )
        correct, total, attacked, robust, shown = self.counts.tolist()
        return Metrics(
            clean_accuracy=correct / total,
            attack_success=attacked / shown if shown else None,
            robust_accuracy=robust / shown if shown else None,
            images=total,
            triggered_images=shown,
        )
