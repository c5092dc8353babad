"""Poison a dataset: put a trigger on some images and give them the attacker's label."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..triggers import Trigger


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set.

    Attributes:
        images: [M, H, W, C] uint8.
        labels: [M] int64.
        mask: [M] bool, true where an image was poisoned.
    """

    images: Tensor
    labels: Tensor
    mask: Tensor


def poison(
    images: Tensor, labels: Tensor, trigger: Trigger, *, rate: float, target: int, seed: int = 0
) -> Poisoned:
    """All-to-one, dirty-label poisoning.

    ``round(rate * M)`` images are drawn without replacement from those whose class is not the
    target, triggered, and labelled ``target``. (BackdoorBench also draws from the target class,
    where the trigger changes no label.)

    Args:
        images: [M, H, W, C] uint8.
        labels: [M] int64.
        rate: poisoned share of the whole set, in 0..1.
        target: the attacker's class.
    Raises:
        ValueError: the rate is outside 0..1 or asks for more images than there are.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"poison: rate must lie in 0..1, got {rate}")
    sources = torch.nonzero(labels != target).flatten()
    count = round(rate * len(images))
    if count > len(sources):
        raise ValueError(
            f"poison: rate {rate} asks for {count} images, but only {len(sources)} are not of "
            f"class {target}; use a rate up to {len(sources) / len(images):.3f}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sources), generator=generator).to(sources.device)
    chosen = sources[order[:count]]
    out_images, out_labels = images.clone(), labels.clone()
    if count > 0:
        out_images[chosen] = trigger.apply(images[chosen])
        out_labels[chosen] = target
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[chosen] = True
    return Poisoned(out_images, out_labels, mask)
