"""The stored bytes and labels of the datasets that are recognised."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.datasets.folder import default_loader, pil_loader
from torchvision.transforms.v2 import functional

from ..decoding import ImageError, decode
from .transforms import NotLiftableError, Pipeline, name_of, read_pipeline, to_bytes

KNOWN = (
    "CIFAR10, CIFAR100, GTSRB, SVHN, MNIST and its kin, ImageFolder, TensorDataset, and Subset and "
    "ConcatDataset of these"
)
# Images may take this share of the available memory: the model and batches need the rest.
MOST_OF_MEMORY = 0.5
THREADS = 8
# At most so many decoded images wait to be stored.
AHEAD = 64


@dataclass
class Source:
    """One dataset taken apart.

    labels: [N] integers as the dataset holds them.
    read: gives the PIL image at an index; ImageError where it is refused.
    array: [N, H, W, C] uint8 in memory; None where images are in files.
    table: [C, 256] float32 for tensors, whose values are known without a pipeline.
    """

    labels: np.ndarray
    pipeline: Pipeline
    read: Callable[[int], Any]
    array: np.ndarray | None = None
    table: Tensor | None = None


def flatten(dataset: Any) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """The datasets inside, and for each sample which of them it is from and its index there."""
    kind = type(dataset)
    if _is(kind, Subset) and kind.__getitems__ is Subset.__getitems__:
        leaves, part, index = flatten(dataset.dataset)
        chosen = np.asarray(dataset.indices)
        if chosen.size == 0:
            chosen = chosen.astype(np.int64)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise NotLiftableError(f"Subset has indices of {chosen.dtype}; expected integers")
        if chosen.size and not -len(index) <= chosen.min() <= chosen.max() < len(index):
            raise NotLiftableError(f"Subset has indices beyond its {len(index)} images")
        return leaves, part[chosen], index[chosen]
    if _is(kind, ConcatDataset):
        every: list[Any] = []
        parts, indices = [], []
        for inner in dataset.datasets:
            leaves, part, index = flatten(inner)
            parts.append(part + len(every))
            indices.append(index)
            every += leaves
        return every, np.concatenate(parts), np.concatenate(indices)
    if not any(_is(kind, known) for known in _SOURCES):
        raise NotLiftableError(f"dataset {kind.__name__} is not recognised; recognised are {KNOWN}")
    count = len(dataset)
    return [dataset], np.zeros(count, dtype=np.int64), np.arange(count)


def open_source(dataset: Any) -> Source:
    """Take apart a dataset that ``flatten`` let through; it is left as it is."""
    if getattr(dataset, "target_transform", None) is not None:
        raise NotLiftableError(
            f"target_transform {name_of(dataset.target_transform)} may draw at random; relabel "
            "the dataset instead"
        )
    make = next(make for known, make in _SOURCES.items() if _is(type(dataset), known))
    return make(dataset)


def read_images(
    source: Source, indices: np.ndarray, total: int, skip: bool
) -> tuple[Tensor, np.ndarray]:
    """The images at these indices, after the pipeline's fixed steps.

    Args:
        indices: [n].
        total: images of this size that have to fit in memory.
        skip: leave out corrupt files.
    Returns:
        [k, H, W, C] uint8, and bool [n]: which of the indices they are.
    """
    kept = np.ones(len(indices), dtype=bool)
    if source.array is not None and not source.pipeline.reshapes:
        _check_room(source.array[0].nbytes * total)
        _check_crop(source.pipeline, source.array.shape[1:3])
        return torch.from_numpy(source.array[indices]), kept
    images: Tensor | None = None
    for row, made in enumerate(_decoded(source, indices, skip)):
        if made is None:
            kept[row] = False
            continue
        if images is None:
            _check_room(made.nbytes * total)
            _check_crop(source.pipeline, made.shape[:2])
            images = torch.zeros(len(indices), *made.shape, dtype=torch.uint8)
        if made.shape != images.shape[1:]:
            raise NotLiftableError(
                f"images differ in size, {list(images.shape[1:])} and {list(made.shape)}; put "
                "Resize((height, width)) first"
            )
        images[row] = torch.from_numpy(np.array(made))
    if images is None:
        raise ValueError(f"lift: none of the {len(indices)} images can be read")
    return (images if kept.all() else images[torch.from_numpy(kept)]), kept


def _decoded(source: Source, indices: np.ndarray, skip: bool) -> Iterator[np.ndarray | None]:
    def one(index: int) -> np.ndarray | None:
        try:
            image = source.read(index)
        except ImageError as error:
            if skip:
                return None
            raise ValueError(f"lift: {error}, or pass skip_corrupt=True") from error
        for step in source.pipeline.fixed:
            image = step(image)
        return to_bytes(image)

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        rest = iter(indices.tolist())
        while block := list(islice(rest, AHEAD)):
            yield from pool.map(one, block)


def _check_room(needed: int) -> None:
    available = _available_bytes()
    if needed > MOST_OF_MEMORY * available:
        raise NotLiftableError(
            f"the images need {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB of memory "
            "are available; resize them, or take a Subset"
        )


def _available_bytes() -> int:
    try:
        with open("/proc/meminfo") as lines:
            known = dict(line.split(":") for line in lines)
        return int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 2**62  # not Linux: unknown, and not to be guessed


def _check_crop(pipeline: Pipeline, size: tuple[int, ...]) -> None:
    if pipeline.crop not in (None, tuple(size)):
        raise NotLiftableError(
            f"RandomCrop cuts {list(pipeline.crop or ())} from images of {list(size)}; expected "
            "the image's own size"
        )


def _is(kind: Any, known: Any) -> bool:
    """Return whether a subclass yields what its parent does."""
    return (
        issubclass(kind, known)
        and kind.__getitem__ is known.__getitem__
        and kind.__len__ is known.__len__
        and (known is Subset or not hasattr(kind, "__getitems__"))
    )


def _arrays(dataset: Any, data: Any, labels: Any) -> Source:
    data = np.asarray(data)
    if data.dtype != np.uint8 or data.ndim != 4 or data.shape[-1] not in (1, 3):
        raise NotLiftableError(
            f"{name_of(dataset)} holds {data.dtype} {list(data.shape)}; expected bytes"
        )

    def read(index: int) -> Image.Image:
        return Image.fromarray(data[index, ..., 0] if data.shape[-1] == 1 else data[index])

    return Source(np.asarray(labels), read_pipeline(dataset.transform), read, array=data)


def _files(dataset: Any, samples: Any) -> Source:
    files = [str(path) for path, _ in samples]
    labels = np.asarray([label for _, label in samples])

    def read(index: int) -> Image.Image:
        # This gives, to the last bit, what the dataset's own loader makes of it, or an error.
        return decode(Path(files[index]), files[index], deep=False)

    return Source(labels, read_pipeline(dataset.transform), read)


def _folder(dataset: Any) -> Source:
    if dataset.loader not in (default_loader, pil_loader):
        raise NotLiftableError(
            f"image loader {name_of(dataset.loader)} is not recognised; recognised is "
            "torchvision's own"
        )
    return _files(dataset, dataset.samples)


def _tensors(dataset: Any) -> Source:
    if len(dataset.tensors) != 2:
        raise NotLiftableError(
            f"TensorDataset holds {len(dataset.tensors)} tensors; expected images and labels"
        )
    images, labels = (t.detach().cpu() for t in dataset.tensors)
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4) or images.numel() == 0:
        raise NotLiftableError(
            f"TensorDataset holds images {list(images.shape)}; expected [N, C, H, W] with C in "
            "1, 3, 4"
        )
    # ToTensor divides, v2 multiplies by the reciprocal; the two differ in the last bit.
    every = torch.arange(256).float()
    for table in (every / 255, every * (1 / 255), _v2_scaled()):
        stored = _bytes_by(images, table)
        if stored is not None:
            break
    else:
        raise NotLiftableError(
            f"TensorDataset holds {images.dtype} images; expected uint8, or float32 multiples of "
            "1/255 in 0..1, not normalised"
        )
    array = stored.permute(0, 2, 3, 1).numpy()
    table = table.repeat(images.shape[1], 1)

    def read(index: int) -> Image.Image:
        raise AssertionError("tensors need no decoding")

    return Source(labels.numpy(), Pipeline([], []), read, array=array, table=table)


def _v2_scaled() -> Tensor:
    """[256] float32: what ToDtype(scale=True) makes of each byte."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    return functional.to_dtype(every, torch.float32, scale=True).flatten()


def _bytes_by(images: Tensor, table: Tensor) -> Tensor | None:
    """The bytes that the table maps to these images, if it does."""
    if images.dtype == torch.uint8:
        return images
    if images.dtype != torch.float32 or not bool(((images >= 0) & (images <= 1)).all()):
        return None
    stored = images.mul(255).round_().to(torch.uint8)
    return stored if torch.equal(table[stored.int()], images) else None


_SOURCES: dict[type, Callable[[Any], Source]] = {
    datasets.CIFAR10: lambda d: _arrays(d, d.data, d.targets),
    datasets.MNIST: lambda d: _arrays(d, np.asarray(d.data)[..., None], d.targets),
    datasets.SVHN: lambda d: _arrays(d, np.asarray(d.data).transpose(0, 2, 3, 1), d.labels),
    datasets.GTSRB: lambda d: _files(d, d._samples),
    datasets.DatasetFolder: _folder,
    TensorDataset: _tensors,
}
