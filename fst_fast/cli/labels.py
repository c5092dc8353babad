"""Checks whether the images' labels, and their normalisation, are the model's own."""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

from ..data import image_sets, normalization
from ..data.device_loader import DeviceLoader
from ..triggers.pixels import NORMALIZATIONS, Normalization
from ..tuning.labels_check import labels_fault
from .measured import Answers, answers

# Other normalisations are tried on so many images, and told where so much more is then right.
TRIED, BETTER = 256, 0.1
_OTHERS: dict[str, Normalization | None] = {
    **NORMALIZATIONS,
    "0.5,0.5,0.5/0.5,0.5,0.5": ((0.5,) * 3, (0.5,) * 3),
}


def check(
    options: argparse.Namespace, model: nn.Module, before: Answers, images: image_sets.ImageSet
) -> None:
    """Stop, or with --force warn, where labels or normalisation cannot be the model's.

    Args:
        before: what the model answers to the images that it is judged by.
        images: the tuning images.
    """
    text = _labels_text(before, images) or _normalize_text(options, model, images)
    if text is None:
        return
    if not options.force:
        raise ValueError(f"{text}; --force goes on all the same")
    print(f"warning: {text}", file=sys.stderr)


def warn(seen: Answers, images: image_sets.ImageSet) -> None:
    """Say on standard error where the labels do not seem to be the model's."""
    text = _labels_text(seen, images)
    if text is not None:
        print(f"warning: {text}", file=sys.stderr)


def _labels_text(seen: Answers, images: image_sets.ImageSet) -> str | None:
    labels, answered = seen.clean
    fault = labels_fault(labels, answered, len(images.classes), images.classes)
    if fault is None:
        return None
    checks = "check --normalize, --size, --arch, and that the classes are the model's in order"
    return f"--data must have the model's own labels, got {fault}; {checks} (--classes FILE)"


def _normalize_text(
    options: argparse.Namespace, model: nn.Module, images: image_sets.ImageSet
) -> str | None:
    """Another known normalisation under which the model is right far more often, in words."""
    given = normalization.normalization(options.normalize)
    some = images
    if len(images) > TRIED:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        some = images.subset(order[:TRIED])

    def accuracy(values: Normalization | None) -> float:
        loader = DeviceLoader(
            some.images, some.labels, options.batch_size, shuffle=False, normalize=values
        )
        return answers(model, loader, options).accuracy

    own = accuracy(given)
    found = {name: accuracy(values) for name, values in _OTHERS.items() if values != given}
    best = max(found, key=lambda name: found[name])
    if found[best] < own + BETTER:
        return None
    return (
        f"--normalize must be as in training, got {options.normalize}, with which "
        f"{100 * own:.1f} % of {len(some)} images are right, and with {best} "
        f"{100 * found[best]:.1f} %; use --normalize {best}"
    )
