"""Poison a dataset: put a trigger on some images and give them the attacker's label."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import Trigger
from .poisoning import Plan, plan

# Told images [n, H, W, C] uint8 and their labels [n]: other images in their place.
Prepare = Callable[[Tensor, Tensor], Tensor]


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
    images: Tensor,
    labels: Tensor,
    trigger: Trigger | Sequence[Trigger],
    *,
    rate: float,
    target: int = 0,
    relabel: str = "all-to-one",
    cover: float = 0.0,
    negatives: float = 0.0,
    prepare: Prepare | None = None,
    seed: int = 0,
) -> Poisoned:
    """Poison a data set once, as an attacker does.

    All-to-one draws ``round(rate * M)`` images without replacement from those whose class is not
    the target. (BackdoorBench also draws from the target class, where the trigger changes no
    label.)

    Args:
        images: [M, H, W, C] uint8.
        labels: [M] int64.
        trigger, target, relabel, cover, seed: see :func:`fst_fast.triggers.poisoning.plan`.
        rate: poisoned share of the whole set, in 0..1.
        negatives: share of all images that keep their label and get what the trigger changed in
            some other image (of BppAttack: its quantisation error).
        prepare: changes the images that are to be poisoned, before the trigger is put on.
    Raises:
        ValueError: a rate is outside 0..1 or asks for more images than there are.
    """
    planned = plan(
        labels, trigger, float(rate), target=target, relabel=relabel, cover=cover, seed=seed
    )
    mask = planned.mask.to(images.device)
    if prepare is not None:
        prepared = images.clone()
        prepared[mask] = prepare(images[mask], labels.to(images.device)[mask])
        images = prepared
    poisoned = planned.apply(images)
    if negatives > 0:
        _add_negatives(poisoned, images, planned, negatives, seed)
    return Poisoned(poisoned, planned.labels.to(labels.device), mask.to(labels.device))


def _add_negatives(
    poisoned: Tensor, images: Tensor, planned: Plan, share: float, seed: int
) -> None:
    """Put other images' changes on images that the plan leaves alone, in place."""
    free = torch.nonzero(planned.trigger < 0).flatten()
    count = round(share * len(images))
    if count > len(free):
        raise ValueError(
            f"poison: negatives {share} ask for {count} images, but only {len(free)} carry no "
            f"trigger; use a share up to {len(free) / len(images):.3f}"
        )
    # Another stream than the plan's.
    generator = torch.Generator().manual_seed(seed + 1)
    rows = free[torch.randperm(len(free), generator=generator)[:count]].to(images.device)
    others = torch.randint(len(images), (count,), generator=generator).to(images.device)
    source = images[others]
    change = planned.triggers[0].apply(source).to(torch.int16) - source.to(torch.int16)
    poisoned[rows] = (images[rows].to(torch.int16) + change).clamp(0, 255).to(torch.uint8)
