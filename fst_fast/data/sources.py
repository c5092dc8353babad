"""Reads the lab's images: folders, ``.npz`` archives, or the digits of scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import image_sets
from .image_sets import ImageSet

# So many of the 1,797 digits are training images.
DIGITS = 1_400


@dataclass(frozen=True)
class Splits:
    """Images to train on and to measure on.

    Attributes:
        name: where they come from.
        train: to poison, and to draw the defender's clean images from.
        test: None where there are none.
        flip: whether a mirrored image still shows its class.
    """

    name: str
    train: ImageSet
    test: ImageSet | None
    flip: bool = True

    @property
    def normalize(self) -> str:
        """The training images' statistics, as ``--normalize`` takes them."""
        statistics = self.train.statistics()
        return "/".join(",".join(f"{value:.4f}" for value in part) for part in statistics)

    def shortened(self, train: int | None, test: int | None, seed: int = 0) -> Splits:
        """With at most so many images of each, drawn at random; None keeps all."""
        if train is None and test is None:
            return self
        return Splits(
            self.name,
            _some(self.train, train, seed),
            None if self.test is None else _some(self.test, test, seed),
            self.flip,
        )


def _some(images: ImageSet, most: int | None, seed: int) -> ImageSet:
    if most is None or most >= len(images):
        return images
    return images.split(most, seed=seed)[0]


def read(path: Path | None, size: int | None = None) -> Splits:
    """Read both sets.

    Args:
        path: a folder with ``train.npz`` and ``test.npz``, or with folders ``train`` and ``test``
            of one sub-folder per class; or one such ``.npz`` or folder, to train on. None is the
            handwritten digits, split once for all.
        size: resize and centre-crop to this many pixels.
    Raises:
        ValueError: no such images.
        RuntimeError: the digits without scikit-learn.
    """
    if path is None:
        train, test = image_sets.digits(size or 32).split(DIGITS, seed=0)
        return Splits("digits", train, test, flip=False)
    parts = [_part(path, name) for name in ("train", "test")]
    if parts[0] is None:
        return Splits(str(path), image_sets.read(path, size), None)
    test_set = None if parts[1] is None else image_sets.read(parts[1], size)
    return Splits(str(path), image_sets.read(parts[0], size), test_set)


def _part(path: Path, name: str) -> Path | None:
    for candidate in (path / f"{name}.npz", path / name):
        if candidate.exists():
            return candidate
    return None
