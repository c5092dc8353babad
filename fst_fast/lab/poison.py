"""Poison a dataset: put a trigger on some images and give them the attacker's label."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..poisoning import plan
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
    images: Tensor,
    labels: Tensor,
    trigger: Trigger | Sequence[Trigger],
    *,
    rate: float,
    target: int = 0,
    relabel: str = "all-to-one",
    cover: float = 0.0,
    seed: int = 0,
) -> Poisoned:
    """Poison a data set once, as an attacker does.

    All-to-one draws ``round(rate * M)`` images without replacement from those whose class is not
    the target. (BackdoorBench also draws from the target class, where the trigger changes no
    label.)

    Args:
        images: [M, H, W, C] uint8.
        labels: [M] int64.
        trigger, target, relabel, cover, seed: see :func:`fst_fast.poisoning.plan`.
        rate: poisoned share of the whole set, in 0..1.
    Raises:
        ValueError: the rate is outside 0..1 or asks for more images than there are.
    """
    planned = plan(
        labels, trigger, float(rate), target=target, relabel=relabel, cover=cover, seed=seed
    )
    return Poisoned(
        planned.apply(images), planned.labels.to(labels.device), planned.mask.to(labels.device)
    )
