"""Random crops and flips, drawn for a whole epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..triggers.plain_numbers import whole_number


@dataclass(frozen=True)
class Augment:
    """Per-sample augmentation on stored bytes: zero-pad, random crop to size, random flip.

    Args:
        pad: zero pixels added on each side before the crop; 0 crops nothing.
        flip: mirror each image left to right with probability 1/2.

    Example:
        >>> fst_fast.Augment(flip=False)
        Augment(pad=4, flip=False)
    """

    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        pad = whole_number(self.pad)
        if pad is None or pad < 0:
            raise ValueError(f"Augment: pad must be an integer >= 0, got {self.pad!r}")
        object.__setattr__(self, "pad", pad)


def resolve(augment: Augment | str | None) -> Augment | None:
    """A loader's ``augment=``; raises ValueError for what is none of its values."""
    if isinstance(augment, str) and augment == "cifar":
        return Augment()
    if augment is None or isinstance(augment, Augment):
        return augment
    raise ValueError(f'DeviceLoader: augment must be None, "cifar" or an Augment, got {augment!r}')


def draw(augment: Augment | None, count: int, generator: torch.Generator) -> Tensor:
    """[count, 3] int32: offsets of the crop by row and column, and flip, for an epoch."""
    if augment is None:
        return torch.zeros(count, 3, dtype=torch.int32)
    crops = torch.randint(0, 2 * augment.pad + 1, (count, 2), generator=generator) - augment.pad
    flips = torch.randint(0, 2, (count, 1), generator=generator) * int(augment.flip)
    return torch.cat([crops, flips], dim=1).int()
