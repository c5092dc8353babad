"""Datasets as stored bytes: handwritten digits, CIFAR-10, image folders, ``.npz`` archives."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..triggers.pixels import Normalization
from .decoding import ImageError, decode
from .npz import read_archive


@dataclass(frozen=True)
class ImageSet:
    """Images and labels in memory.

    Attributes:
        images: [M, H, W, C] uint8.
        labels: [M] int64.
        classes: the name of each label.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> ImageSet:
        """The images at these positions, [n] int64 or [M] bool."""
        return ImageSet(self.images[index], self.labels[index], self.classes)

    def split(self, *sizes: int, seed: int = 0) -> tuple[ImageSet, ...]:
        """Disjoint random parts of the given sizes; a last part takes what is left, if any.

        Raises:
            ValueError: a negative size, or more asked for than there is.
        """
        if sum(sizes) > len(self) or min(sizes, default=0) < 0:
            raise ValueError(
                f"split: sizes must be >= 0 and sum to at most {len(self)}, got {list(sizes)}"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        rest = len(self) - sum(sizes)
        parts = torch.split(order, [*sizes, rest] if rest else list(sizes))
        return tuple(self.subset(part) for part in parts)

    def describe(self) -> dict[str, object]:
        """For manifests: SHA-256 of the bytes and labels, how many, and the classes' names."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return {"sha256": digest.hexdigest(), "images": len(self), "classes": list(self.classes)}

    def statistics(self) -> Normalization:
        """(mean, std) per channel in units of 0..1, for ``normalize=``."""
        pixels = self.images.reshape(-1, self.images.shape[-1]).double() / 255
        return pixels.mean(0).tolist(), pixels.std(0).tolist()


def digits(size: int = 32) -> ImageSet:
    """The 1,797 handwritten digits that come with scikit-learn, as RGB, resized bilinearly.

    Raises:
        RuntimeError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise RuntimeError(
            'digits: needs scikit-learn; install it with pip install "fst_fast[lab]"'
        ) from None
    raw = load_digits()
    small = torch.from_numpy(raw.images).float()[:, None] * (255 / 16)  # stored as 0..16
    large = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")
    images = large.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    return ImageSet(images, torch.from_numpy(raw.target).long(), tuple("0123456789"))


def cifar10(root: str | Path, train: bool = True, download: bool = False) -> ImageSet:
    """CIFAR-10 in torchvision's format under ``root``."""
    from torchvision.datasets import CIFAR10

    with warnings.catch_warnings():
        # torchvision unpickles the archive in a way that new NumPy versions warn about.
        warnings.simplefilter("ignore")
        data = CIFAR10(str(root), train=train, download=download)
    return ImageSet(torch.from_numpy(data.data), torch.tensor(data.targets), tuple(data.classes))


def _pixels(source: Path | bytes, where: str, size: int | None) -> Tensor:
    """One image as [H, W, 3] uint8."""
    image = decode(source, where)
    if size is not None and image.size != (size, size):
        # The import takes seconds.
        from torchvision.transforms.functional import center_crop, resize

        image = center_crop(resize(image, [size]), [size, size])
    return torch.from_numpy(np.array(image))


def _read(
    where: str, sources: Iterable[tuple[Path | bytes, str]], size: int | None, skip: bool
) -> tuple[Tensor, Tensor]:
    """The images, [k, H, W, 3] uint8, and bool [n]: which of the n sources they are."""
    images: list[Tensor] = []
    kept: list[bool] = []
    first = ""
    for source, name in sources:
        try:
            image = _pixels(source, name, size)
        except ImageError as error:
            if not skip:
                raise ValueError(
                    f"{where}: {error}, or pass skip_corrupt=True (--skip-corrupt)"
                ) from None
            kept.append(False)
            continue
        first = first or name
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{where}: images must have one size, got {list(images[0].shape)} in {first} and "
                f"{list(image.shape)} in {name}; pass size= to resize and centre-crop them"
            )
        images.append(image)
        kept.append(True)
    if not images:
        raise ValueError(f"{where}: none of the {len(kept)} images can be read")
    if not all(kept):
        warnings.warn(
            f"{where}: left out {len(kept) - len(images)} of {len(kept)} images, which cannot be "
            "read",
            stacklevel=3,
        )
    return torch.stack(images).contiguous(), torch.tensor(kept)


def folder(root: str | Path, size: int | None = None, *, skip_corrupt: bool = False) -> ImageSet:
    """A folder with one sub-folder of images per class.

    Labels are the positions of the sub-folders' names in sorted order, as in torchvision's
    ImageFolder; but names that are all whole numbers are sorted as numbers, as timm does, so that
    10 comes behind 2. Names that begin with a dot are passed over. Files whose suffix is not
    .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff or .webp are passed over. What becomes of each
    kind of image is told at :func:`fst_fast.data.decoding.decode`.

    Args:
        root: the folder.
        size: resize the shorter side to this many pixels and crop the centre square.
        skip_corrupt: leave out images that cannot be read, with one warning that counts them.
    Raises:
        ValueError: no images, an image that ``decode`` refuses, several sizes and no ``size``, or
            a link by which a folder is reached twice.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes = _in_order([name for name in find_classes(str(root))[0] if name[0] != "."])
        class_to_idx = {name: number for number, name in enumerate(classes)}
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {root}.")
        _check_links(root)
        samples = make_dataset(str(root), class_to_idx, extensions=IMG_EXTENSIONS)
    except OSError as error:
        raise ValueError(
            f"folder: root must hold one sub-folder of images per class, got {root}: {error}"
        ) from None
    sources = ((Path(path), path) for path, _ in samples)
    images, kept = _read(f"folder {root}", sources, size, skip_corrupt)
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    return ImageSet(images, labels[kept], tuple(classes))


def whole_names(names: Sequence[str]) -> list[int] | None:
    """The numbers that the names are; None where one is no whole number, or one comes twice."""
    if not all(name.isascii() and name.isdigit() and len(name) < 10 for name in names):
        return None
    numbers = [int(name) for name in names]
    return numbers if numbers and len(set(numbers)) == len(numbers) else None


def _in_order(names: list[str]) -> list[str]:
    return sorted(names, key=int) if whole_names(names) is not None else sorted(names)


def _check_links(root: str | Path) -> None:
    """A link to a folder above would be followed for ever."""
    reached: dict[str, str] = {}
    for place, _, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in reached:
            raise ValueError(
                f"folder: {place} must be reached once, got a link to {reached[real]}, which is "
                "read already; remove the link"
            )
        reached[real] = place


def read(path: Path, size: int | None = None, *, skip_corrupt: bool = False) -> ImageSet:
    """An archive by :func:`npz` where the name ends in ``.npz``, else a :func:`folder`."""
    reader = npz if path.suffix == ".npz" else folder
    return reader(path, size, skip_corrupt=skip_corrupt)


def npz(path: str | Path, size: int | None = None, *, skip_corrupt: bool = False) -> ImageSet:
    """An archive of encoded images.

    It holds ``encoded`` uint8 (all files one after another), ``offsets`` [M + 1] (where each of
    them begins, and the last one ends), ``labels`` [M] and ``classes`` (the name of each label).

    Args:
        path: the ``.npz`` file.
        size, skip_corrupt: as in :func:`folder`.
    Raises:
        ValueError: an array is missing, of another kind or does not fit the others; the archive
            cannot be read without pickle; or an image is refused.
    """
    path = Path(path)
    archive = read_archive(path)
    sources = ((data, f"{i} of {path}") for i, data in enumerate(archive.files))
    images, kept = _read(f"npz {path}", sources, size, skip_corrupt)
    return ImageSet(images, torch.from_numpy(archive.labels)[kept], archive.classes)
