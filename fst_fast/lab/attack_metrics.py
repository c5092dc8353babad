"""Measures a model, an attack on it, and the worth of a defence."""

from __future__ import annotations

import torch
from torch import nn

from ..data.augment import Augment
from ..data.device_loader import DeviceLoader
from ..data.image_sets import ImageSet
from ..measure.evaluate import Metrics, evaluate
from ..triggers import Trigger
from .reattack import Reactivation, reactivate, retune
from .suspect_manifest import Suspect

BATCH = 500
# QRA learns from so many images, where there are as many.
QUERIES = 500


def measure_attack(
    model: nn.Module,
    test: ImageSet,
    suspect: Suspect,
    device: torch.device | str | None = None,
    precision: str = "auto",
) -> Metrics:
    """Clean accuracy, attack success and robust accuracy under the suspect's own attack.

    Of an attack that gives each class the next, success is the share of triggered images that are
    taken for the class after their own.

    Example:
        >>> from fst_fast.data.image_sets import ImageSet
        >>> images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
        >>> test = ImageSet(images, torch.arange(4) % 2, ("cat", "dog"))
        >>> suspect = fst_fast.lab.Suspect(
        ...     "badnets",
        ...     fst_fast.triggers.BadNets(),
        ...     target=0,
        ...     relabel="all-to-one",
        ...     rate=0.1,
        ...     network=fst_fast.lab.network("resnet8"),
        ...     classes=test.classes,
        ...     normalize=None,
        ...     flip=True,
        ... )
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        >>> fst_fast.lab.measure_attack(model, test, suspect).triggered_images
        2
    """
    if suspect.trigger is None or suspect.relabel != "all-to-all":
        return _measure(model, test, suspect, suspect.target, device, precision)
    parts = []
    for label in test.labels.unique().tolist():
        own, following = test.subset(test.labels == label), (label + 1) % len(suspect.classes)
        parts.append(_measure(model, own, suspect, following, device, precision))
    return _together(parts)


def _measure(
    model: nn.Module,
    test: ImageSet,
    suspect: Suspect,
    target: int,
    device: torch.device | str | None,
    precision: str,
) -> Metrics:
    loader = DeviceLoader(
        test.images,
        test.labels,
        BATCH,
        shuffle=False,
        device=device,
        normalize=suspect.normalize,
    )
    return evaluate(model, loader, suspect.trigger, target, device=device, precision=precision)


def _together(parts: list[Metrics]) -> Metrics:
    """Return the metrics of all from those of disjoint sets of images."""
    images = sum(part.images for part in parts)
    triggered = sum(part.triggered_images for part in parts)

    def mean(name: str, weight: str, total: int) -> float:
        shares = ((getattr(part, name) or 0.0) * getattr(part, weight) for part in parts)
        return sum(shares) / total

    return Metrics(
        clean_accuracy=mean("clean_accuracy", "images", images),
        attack_success=mean("attack_success", "triggered_images", triggered),
        robust_accuracy=mean("robust_accuracy", "triggered_images", triggered),
        images=images,
        triggered_images=triggered,
    )


def rating(before: Metrics, after: Metrics) -> float | None:
    """The defence effectiveness rating (DER; Zhu et al., arXiv 2304.11823), in 0..1.

    ``(max(0, fall of attack success) - max(0, fall of clean accuracy) + 1) / 2``: 0.5 for a defence
    that does nothing. None where no attack was measured.

    Example:
        >>> before = fst_fast.Metrics(0.9, 1.0, 0.0, images=100, triggered_images=90)
        >>> after = fst_fast.Metrics(0.9, 0.0, 0.9, images=100, triggered_images=90)
        >>> fst_fast.lab.rating(before, after)
        1.0
    """
    if before.attack_success is None or after.attack_success is None:
        return None
    removed = max(0.0, before.attack_success - after.attack_success)
    lost = max(0.0, before.clean_accuracy - after.clean_accuracy)
    return (removed - lost + 1) / 2


def woken(
    model: nn.Module,
    known: ImageSet,
    suspect: Suspect,
    device: torch.device | str | None = None,
    precision: str = "auto",
) -> nn.Module:
    """The model after the retuning attack (RA) with the suspect's trigger.

    Raises:
        ValueError: a model without a backdoor or with one for every class, or too few images.
    """
    return retune(
        model,
        known,
        _trigger(suspect),
        suspect.target,
        normalize=suspect.normalize,
        augment=Augment(flip=suspect.flip),
        device=device,
        precision=precision,
    )


def reactivated(
    model: nn.Module,
    retuned: nn.Module,
    clean_model: nn.Module,
    known: ImageSet,
    test: ImageSet,
    suspect: Suspect,
    device: torch.device | str | None = None,
    precision: str = "auto",
) -> Reactivation:
    """Return what the query-based reactivation attack (QRA) finds; raises as :func:`woken`."""
    return reactivate(
        model,
        retuned,
        clean_model,
        known,
        test,
        _trigger(suspect),
        suspect.target,
        normalize=suspect.normalize,
        images=min(QUERIES, len(known)),
        device=device,
        precision=precision,
    )


def _trigger(suspect: Suspect) -> Trigger:
    if suspect.trigger is None or suspect.relabel == "all-to-all":
        kind = "no backdoor" if suspect.trigger is None else "one for every class"
        raise ValueError(
            f"lab: RA and QRA must have a backdoor with one target to wake, got {kind}; leave them "
            "out"
        )
    return suspect.trigger
