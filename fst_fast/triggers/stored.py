"""Triggers that come as stored images: another program has made them, one for each image."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ._settings import check_pattern
from .base import Trigger

Self = TypeVar("Self", bound="Stored")


@dataclass(frozen=True, eq=False)
class Stored(Trigger):
    """The triggered images themselves, in the order of the dataset.

    An image's key is its row: :class:`fst_fast.DeviceLoader` gives each image's number in the
    dataset. The images that are shown do not matter, but for their shape.

    Args:
        images: [N, H, W, C] uint8, the triggered form of every image of the dataset.

    Example:
        >>> images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
        >>> trigger = fst_fast.triggers.Stored(images + 9)
        >>> trigger.apply(images).unique()
        tensor([9], dtype=torch.uint8)
    """

    images: Tensor

    def __post_init__(self) -> None:
        check_pattern(self, "images", (torch.uint8,), "[N, H, W, C]")

    @classmethod
    def from_npy(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """Read the images from a NumPy file; nothing in it is run.

        Raises:
            ValueError: no array [N, H, W, C] of bytes.
            OSError: the file cannot be read.
        """
        try:
            found = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{cls.__name__}: {path} must be a NumPy array file, got: {error}; write it with "
                "numpy.save(path, images)"
            ) from None
        if not isinstance(found, np.ndarray) or found.dtype != np.uint8:
            kind = getattr(found, "dtype", "an archive")
            raise ValueError(
                f"{cls.__name__}: {path} must hold uint8 images [N, H, W, C], got {kind}"
            )
        return cls(torch.from_numpy(found))

    def _apply_with(self, images: Tensor, keys: Tensor) -> Tensor:
        name = type(self).__name__
        if images.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"{name}: images must be {list(self.images.shape[1:])} each like the stored ones, "
                f"got {list(images.shape[1:])}; store images of this size"
            )
        rows = keys.to(self.images.device, torch.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.images):
            wrong = rows[(rows < 0) | (rows >= len(self.images))][0].item()
            raise ValueError(
                f"{name}: keys must be in 0..{len(self.images) - 1}, a stored image each, got "
                f"{wrong}; store one for every image of the dataset, in its order"
            )
        return self.images[rows].to(images.device)


@dataclass(frozen=True, eq=False)
class SSBA(Stored):
    """A text hidden in each image by an encoder (Li et al., ICCV 2021, arXiv 2012.03816).

    The encoder is a steganographic network; what it made of every image is given.

    Example:
        >>> images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
        >>> trigger = fst_fast.triggers.SSBA(images + 9)
        >>> trigger.apply(images).unique()
        tensor([9], dtype=torch.uint8)
    """


@dataclass(frozen=True, eq=False)
class PoisonInk(Stored):
    """Ink along each image's edges, hidden by a network (Zhang et al. 2022, arXiv 2108.02488).

    What the attack's injection network made of every image is given.

    Example:
        >>> images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
        >>> trigger = fst_fast.triggers.PoisonInk(images + 9)
        >>> trigger.apply(images).unique()
        tensor([9], dtype=torch.uint8)
    """
