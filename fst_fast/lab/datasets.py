"""Datasets as stored bytes: handwritten digits, CIFAR-10, image folders, ``.npz`` archives."""

from __future__ import annotations

import io
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop, resize

from ..pixels import Normalization

# What np.load raises on files that are damaged, empty, of another kind, or not there.
_UNREADABLE = (
    *(KeyError, ValueError, OSError, EOFError),
    *(zipfile.BadZipFile, AttributeError, TypeError),
)


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


def _decode(encoded: bytes, size: int | None) -> Tensor:
    """One encoded file to [H, W, 3] uint8; OSError where it is none."""
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            # Of 16 bits per pixel, convert() would clip rather than keep the upper 8.
            deep = opened.mode.startswith("I")
            upper = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)) if deep else opened
            image = upper.convert("RGB")
    except Exception as error:
        # On damaged files Pillow raises SyntaxError, TypeError, ValueError and more.
        raise OSError(f"{type(error).__name__}: {error}") from error
    if size is not None and image.size != (size, size):
        image = center_crop(resize(image, [size]), [size, size])
    return torch.from_numpy(np.array(image))


def _stack(images: list[Tensor], source: str) -> Tensor:
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) != 1:
        raise ValueError(
            f"{source}: images must have one size, got {sorted(shapes)[:4]}; "
            "pass size= to resize and centre-crop them"
        )
    return torch.stack(images).contiguous()


def folder(root: str | Path, size: int | None = None) -> ImageSet:
    """A folder with one sub-folder of images per class, as torchvision's ImageFolder reads it.

    Labels are the positions of the sub-folders' names in sorted order.

    Args:
        root: the folder.
        size: resize the shorter side to this many pixels and crop the centre square.
    Raises:
        ValueError: no images, an undecodable image, or several sizes and no ``size``.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, class_to_idx = find_classes(str(root))
        samples = make_dataset(str(root), class_to_idx, extensions=IMG_EXTENSIONS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"folder: root must hold one sub-folder of images per class, got {root}: {error}"
        ) from None
    images = []
    for path, _ in samples:
        try:
            images.append(_decode(Path(path).read_bytes(), size))
        except OSError as error:
            raise ValueError(
                f"folder: cannot decode {path}: {error}; remove or repair the file"
            ) from None
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    return ImageSet(_stack(images, f"folder {root}"), labels, tuple(classes))


def npz(path: str | Path, size: int | None = None) -> ImageSet:
    """An archive of encoded images: ``encoded`` (all files one after another), ``offsets``,
    ``labels`` and ``classes``.

    Args:
        path: the ``.npz`` file.
        size: as in :func:`folder`.
    Raises:
        ValueError: an array is missing, the archive cannot be read without pickle, or an image
            cannot be decoded.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            encoded, offsets = archive["encoded"], archive["offsets"]
            labels, classes = archive["labels"], archive["classes"]
    except _UNREADABLE as error:
        raise ValueError(
            f"npz: {path} must be an .npz with encoded, offsets, labels and classes: {error}"
        ) from None
    images = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        try:
            images.append(_decode(encoded[start:end], size))
        except OSError as error:
            raise ValueError(f"npz: cannot decode image {len(images)} of {path}: {error}") from None
    if len(images) != len(labels):
        raise ValueError(f"npz: {path} has {len(images)} images but {len(labels)} labels")
    return ImageSet(
        _stack(images, f"npz {path}"),
        torch.from_numpy(labels.astype(np.int64)),
        tuple(str(name) for name in classes),
    )
