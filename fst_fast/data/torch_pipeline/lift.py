"""A standard torchvision pipeline inside a DataLoader, as stored bytes and a few settings."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from .datasets import Source, flatten, open_source, read_images
from .transforms import NotLiftableError, name_of, value_table


@dataclass(frozen=True)
class Lifted:
    """The batches that a DataLoader yields, without the DataLoader.

    A batch equals ``lut[c, images[index][..., c]]`` to the last bit, before crops and flips.

    Args:
        images: [M, H, W, C] uint8 on the CPU, in the dataset's order.
        labels: [M] int64.
        batch_size, shuffle, drop_last: the loader's own.
        pad: zero pixels on each side before a random crop back to size; 0 crops nothing.
        flip: mirror half the images left to right.
        lut: [C, 256] float32, the value of each byte.
        normalize: (mean, std) per channel, for information; None leaves 0..1.
    """

    images: Tensor
    labels: Tensor
    batch_size: int
    shuffle: bool
    drop_last: bool
    pad: int
    flip: bool
    lut: Tensor
    normalize: tuple[list[float], list[float]] | None


def lift(loader: Any, *, skip_corrupt: bool = False) -> Lifted | str:
    """Recognise a DataLoader's pipeline and read its images once.

    The loader and its dataset stay as they are. Bytes in a TensorDataset stand for 0..1, though
    the loader itself would yield them as bytes.

    Args:
        loader: a torch DataLoader.
        skip_corrupt: leave out files that cannot be read, with one warning.
    Returns:
        The images and settings, or in one line the reason why the loader must stay.
    Raises:
        ValueError: an image file cannot be read.
    """
    try:
        shuffle = _check_loader(loader)
        images, labels, source, lut = _read(loader.dataset, skip_corrupt)
    except NotLiftableError as reason:
        return " ".join(str(reason).split())
    normalize = source.pipeline.normalize
    if normalize is not None:
        mean, std = (v * len(lut) if len(v) == 1 else v for v in normalize)
        normalize = (mean, std)
    return Lifted(
        images,
        labels,
        loader.batch_size,
        shuffle,
        loader.drop_last,
        source.pipeline.pad,
        source.pipeline.flip,
        lut,
        normalize,
    )


def _check_loader(loader: Any) -> bool:
    """Return whether it shuffles; raises where it does more than batch in order or shuffled."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        raise NotLiftableError(f"loader {name_of(loader)} is not a torch DataLoader")
    if isinstance(loader.dataset, IterableDataset):
        raise NotLiftableError("the dataset is iterable; expected one with indices")
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise NotLiftableError("batch_sampler is not the default one; pass batch_size instead")
    if loader.collate_fn is not default_collate:
        raise NotLiftableError(f"collate_fn {name_of(loader.collate_fn)} is not the default one")
    sampler: Any = loader.sampler
    if type(sampler) not in (SequentialSampler, RandomSampler):
        raise NotLiftableError(
            f"{name_of(sampler)} is not recognised; recognised are SequentialSampler and "
            "RandomSampler"
        )
    count = len(loader.dataset)  # type: ignore[arg-type]
    if len(sampler) != count or len(sampler.data_source) != count:
        raise NotLiftableError(f"{name_of(sampler)} draws {len(sampler)} of {count} images")
    if getattr(sampler, "replacement", False):
        raise NotLiftableError("RandomSampler draws with replacement")
    return type(sampler) is RandomSampler


def _read(dataset: Any, skip: bool) -> tuple[Tensor, Tensor, Source, Tensor]:
    """Images [M, H, W, C], labels [M], a source that stands for all, and the value of each byte."""
    leaves, part, index = flatten(dataset)
    if len(index) == 0:
        raise NotLiftableError("the dataset is empty")
    # All pipelines are read before any image is.
    sources = {leaf: open_source(leaves[leaf]) for leaf in np.unique(part).tolist()}
    labels = torch.zeros(len(index), dtype=torch.int64)
    kept = np.ones(len(index), dtype=bool)
    images, luts = [], []
    for leaf, source in sources.items():
        here = np.flatnonzero(part == leaf)
        labels[here] = _labels(source.labels, index[here])
        made, kept[here] = read_images(source, index[here], len(index), skip)
        images.append(made)
        channels = made.shape[-1]
        luts.append(
            value_table(source.pipeline, channels) if source.table is None else source.table
        )
    first, *_ = sources.values()
    _check_agree(list(sources.values()), luts, [made.shape[1:] for made in images])
    if not kept.all():
        warnings.warn(
            f"lift: left out {(~kept).sum()} of {len(kept)} images, whose files cannot be read",
            stacklevel=3,
        )
    if len(images) == 1:
        return images[0], labels[kept], first, luts[0]
    # The images go back from one dataset after the other to the order of the samples.
    order = np.argsort(np.argsort(part[kept], kind="stable"))
    return torch.cat(images)[torch.from_numpy(order)], labels[kept], first, luts[0]


def _labels(labels: np.ndarray, index: np.ndarray) -> Tensor:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise NotLiftableError(
            f"labels are {labels.dtype} {list(labels.shape)}; expected integers, one per image"
        )
    chosen = labels[index]
    if int(chosen.min()) < 0 or int(chosen.max()) >= 2**31:
        raise NotLiftableError(
            f"labels go from {chosen.min()} to {chosen.max()}; expected 0 or more, within int32"
        )
    return torch.from_numpy(chosen.astype(np.int64))


def _check_agree(sources: list[Source], luts: list[Tensor], shapes: list[torch.Size]) -> None:
    def settings(source: Source) -> tuple[int, bool]:
        return source.pipeline.pad, source.pipeline.flip

    if len(set(shapes)) > 1:
        raise NotLiftableError(
            f"images differ in size, {list(shapes[0])} and {list(shapes[-1])}; put "
            "Resize((height, width)) first"
        )
    for source, lut in zip(sources, luts, strict=True):
        if settings(source) != settings(sources[0]) or not torch.equal(lut, luts[0]):
            raise NotLiftableError("the datasets in ConcatDataset have different transforms")
