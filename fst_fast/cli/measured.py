"""A model measured with every answer kept: who is taken for whom, and what triggers wake."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import Batches, dtype_of, resolve_device, resolve_precision
from ..data.device_loader import DeviceLoader
from ..measure.evaluate import Metrics, measure
from ..triggers import Trigger


@dataclass(frozen=True)
class Answers:
    """Labels and the model's answers, [2, N] int64 on the CPU.

    Attributes:
        clean: of the images as they are.
        triggered: of the images with each trigger, by its name.
    """

    clean: Tensor
    triggered: dict[str, Tensor]

    @property
    def accuracy(self) -> float:
        """The share of images as they are that are classified as their label."""
        labels, answered = self.clean
        return int((labels == answered).sum()) / len(labels)

    def metrics(self, name: str | None = None, target: int = 0) -> Metrics:
        """Return what :func:`fst_fast.evaluate` gives for this trigger and target, or for none."""
        if name is None:
            return Metrics(self.accuracy, None, None, self.clean.shape[1], 0)
        labels, answered = self.triggered[name]
        other = labels != target
        others = int(other.sum())
        attacked = int((other & (answered == target)).sum())
        robust = int((other & (answered == labels)).sum())
        return Metrics(
            clean_accuracy=self.accuracy,
            attack_success=attacked / others if others else None,
            robust_accuracy=robust / others if others else None,
            images=self.clean.shape[1],
            triggered_images=others,
        )

    def most_answered(self, name: str) -> int:
        """The class that the greatest share of other classes' images is taken for."""
        labels, answered = self.triggered[name]
        most = 1 + int(self.triggered[name].max())
        wrong = torch.bincount(answered[answered != labels], minlength=most)
        others = len(labels) - torch.bincount(labels, minlength=most)
        return int((wrong.double() / others.clamp(min=1)).argmax())


def answers(
    model: nn.Module,
    loader: DeviceLoader,
    options: argparse.Namespace,
    triggers: Mapping[str, Trigger] | None = None,
    target: int = 0,
) -> Answers:
    """Classify every image once as it is and once with each trigger, as ``evaluate`` does."""
    place = resolve_device(options.device, model)
    precision = resolve_precision(options.precision, place, dtype_of(model))
    batches = Batches(loader, 1, "evaluate: loader", at_once=True)
    seen: dict[str | None, list[Tensor]] = {}

    def watch(name: str | None, labels: Tensor, answered: Tensor) -> None:
        seen.setdefault(name, []).append(torch.stack([labels.long(), answered]))

    measure(model, batches, place, precision, triggers, target, loader.normalize, watch)
    pairs = {name: torch.cat(parts, dim=1).cpu() for name, parts in seen.items()}
    return Answers(pairs.pop(None), {str(name): pair for name, pair in pairs.items()})
