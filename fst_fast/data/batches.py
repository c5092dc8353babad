"""Adapts the batches that users pass in to one form, and checks them in words."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .adapters import Adapter, Loader, adapt, pair, single
from .compute import (
    AUTOCAST,
    PRECISIONS,
    autocast,
    dtype_of,
    existing_device,
    memory_layout,
    native_bf16,
    resolve_device,
    resolve_precision,
    safe_layout,
)

__all__ = [
    "AUTOCAST",
    "PRECISIONS",
    "Batches",
    "Loader",
    "autocast",
    "check_batch",
    "dtype_of",
    "existing_device",
    "memory_layout",
    "native_bf16",
    "resolve_device",
    "resolve_precision",
    "safe_layout",
]

# After so many batches of a loader that tells no length, the first epoch may have no end.
NO_END = 10_000


class Batches:
    """Any iterable of (images, labels), or a function that makes one, as checked epochs.

    Args:
        loader: what a kind of :mod:`fst_fast.data.adapters` takes: a DataLoader, a list of batches,
            a function that returns a fresh iterator, or (for one epoch) an iterator. Batches may
            be mappings, such as of ``pixel_values`` and ``labels``.
        epochs: how often it will be iterated.
        where: the function and argument to name in errors, such as "purify: loader".
        at_once: the next epoch goes on behind the first batch, so that a DataLoader's workers
            start once; random draws are then those of now, not of the epoch.
        steps: batches of an epoch; the rest are for the next one where the loader is a one-shot
            iterator, and left out where it is not. None takes all.
    Attributes:
        adapter: what kind of loader it is.
        first: the first batch.
        steps: as given.
    Raises:
        ValueError: empty, not iterable, or a one-shot iterator for more than one epoch.
    """

    def __init__(
        self,
        loader: Loader,
        epochs: int,
        where: str,
        *,
        at_once: bool = False,
        steps: int | None = None,
    ) -> None:
        self.loader = loader
        self.where = where
        self.note: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=3)
        self.adapter: Adapter = adapt(loader, where)
        self.steps = steps
        self._joins = self._told = False
        self.adapter.seek(0)
        source = self.adapter.open()
        iterator = iter(source)
        # An iterator is its own iter(); a DataLoader, even with persistent workers, is not.
        self._peeked = source if iterator is source else None
        again = self._peeked is not None and (epochs > 1 or steps is not None)
        one_shot = again and not self.repeats
        if one_shot and steps is None:
            raise ValueError(
                f"{where} must be iterable once per epoch ({epochs} times), got a one-shot "
                f"{type(loader).__name__}; pass a DataLoader, a list of batches, or a function "
                "that returns a fresh iterator"
            )
        try:
            self.first = pair(next(iterator), where)
        except StopIteration:
            raise ValueError(
                f"{where} must yield at least one batch, got none; check the dataset's length, "
                "batch_size and drop_last"
            ) from None
        length = self.adapter.length()
        if steps is not None and length is not None and length < steps:
            raise ValueError(
                f"{where} must have the {steps} batches of steps_per_epoch, got {length}; leave "
                "steps_per_epoch out, or give a loader of more batches"
            )
        self._opened = iterator if at_once else None
        self._goes_on = iterator if one_shot and steps is not None else None

    def join_singles(self) -> None:
        """From now on, a batch of one image is joined to the one before it; said once, by ``note``.

        For models that cannot be trained on one image alone, as batch norm may not.

        Raises:
            ValueError: the first batch has one image.
        """
        if single(self.first):
            raise ValueError(
                f"{self.where} must yield batches of two images or more, as the model's batch norm "
                "cannot be trained on one, got one of a single image; use a larger batch_size"
            )
        self._joins = True

    def sizes(self) -> list[int] | None:
        """Images in each batch of an epoch, where the loader tells; singles joined if asked for."""
        sizes = self.adapter.sizes()
        if sizes is not None:
            sizes = sizes[: self.steps]
        if sizes is None or not self._joins:
            return sizes
        joined: list[int] = []
        for size in sizes:
            if size == 1 and joined:
                joined[-1] += 1
                self._tell_joined()
            else:
                joined.append(size)
        return joined

    def length(self) -> int | None:
        """Batches of an epoch; None where nobody tells."""
        return self.adapter.length() if self.steps is None else self.steps

    def images(self) -> int | None:
        """Images of an epoch; None where nobody tells."""
        sizes = self.sizes()
        return None if sizes is None else sum(sizes)

    @functools.cached_property
    def repeats(self) -> bool:
        """Return whether the loader can be gone through again, as a one-shot iterator cannot."""
        return self._peeked is None or self.adapter.open() is not self._peeked

    @property
    def draws_ahead(self) -> bool:
        """Return whether random draws are made for batches that were not yet handed out."""
        return self.adapter.draws_ahead or (self._joins and self.adapter.sizes() is None)

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The batches of one epoch (0-based), as (images, labels)."""
        found: Iterator[Any] = (pair(batch, self.where) for batch in self._all(epoch))
        if self.steps is not None:
            found = itertools.islice(found, self.steps)
        elif epoch == 0 and self.adapter.length() is None:
            found = self._counted(found)
        if self._joins:
            sizes = self.adapter.sizes()
            if sizes is None or 1 in sizes:
                return self._joined(found)
        return found

    def _all(self, epoch: int) -> Iterator[Any]:
        if self._opened is not None:
            opened, self._opened = self._opened, None
            return itertools.chain([self.first], opened)
        if self._goes_on is not None:
            first = [self.first] if epoch == 0 else []
            return itertools.chain(first, self._goes_on)
        self.adapter.seek(epoch)
        source = self.adapter.open()
        # A one-shot iterator has already given its first batch away.
        return itertools.chain([self.first], source) if source is self._peeked else iter(source)

    def _joined(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Each batch waits for the next one, which may be a single image."""
        held: Any = None
        for batch in batches:
            if held is not None and single(batch):
                held = (torch.cat([held[0], batch[0]]), torch.cat([held[1], batch[1]]))
                self._tell_joined()
                continue
            if held is not None:
                yield held
            held = batch
        if held is not None:
            yield held

    def _tell_joined(self) -> None:
        if not self._told:
            self._told = True
            self.note(
                f"{self.where}: a batch of one image is joined to the one before it, as the "
                "model's batch norm cannot be trained on one"
            )

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for count, batch in enumerate(batches, 1):
            if count == NO_END:
                self.note(
                    f"{self.where}: {NO_END} batches of the first epoch, and no end is in sight; "
                    "where the loader has none, give steps_per_epoch"
                )
            yield batch


def check_batch(
    batch: Any,
    where: str,
    device: torch.device,
    num_classes: int | None = None,
    values: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return (images, labels) of a batch, or raise ValueError in words.

    Args:
        batch: (images [B, C, H, W] float, labels [B] integer); later entries are ignored.
        where: what to name in errors, such as "purify: loader".
        device: where the model is; batches come from the CPU or from there.
        num_classes: labels must lie in 0..num_classes-1; None leaves that to the caller.
        values: also look for NaN and Inf in images on the CPU.
    """
    batch = pair(batch, where)
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise ValueError(
            f"{where} must yield (images, labels), got {_describe(batch)}; yield the labels as "
            "well: purification and evaluation need them"
        )
    images, labels = batch[0], batch[1]
    _check_images(images, where, device, values)
    _check_labels(labels, where, len(images))
    # Reading a GPU tensor waits for the device: there the guard looks.
    if num_classes is not None and labels.device.type == "cpu":
        _check_label_range(labels, where, num_classes)
    return images, labels


def _check_images(images: Any, where: str, device: torch.device, values: bool) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        got = _describe(images)
        raise ValueError(
            f"{where} must yield images as a float tensor [B, C, H, W], normalised as in training, "
            f"got {got}; for stored bytes use fst_fast.DeviceLoader(images, labels, normalize=...)"
        )
    if len(images) == 0:
        raise ValueError(
            f"{where} must yield batches of at least one image, got {_describe(images)}"
        )
    if images.device.type != "cpu" and not _same_device(images.device, device):
        raise ValueError(
            f"{where} must yield images on cpu or {device}, where the model is, got "
            f"{images.device}; pass device='{images.device}' or move the loader"
        )
    if values and images.device.type == "cpu" and not images.sum(dtype=torch.float64).isfinite():
        bad = (~images.isfinite()).nonzero()
        if len(bad) > 0:
            raise ValueError(
                f"{where} must yield finite images, got {images[tuple(bad[0])].item()} at "
                f"[sample, channel, row, column] {bad[0].tolist()} of a batch; check the files "
                "and the normalisation (a standard deviation of 0?)"
            )


def _check_labels(labels: Any, where: str, count: int) -> None:
    fix = ""
    if isinstance(labels, Tensor):
        if labels.shape == (count, 1):
            fix = "; pass labels.flatten().long()"
        elif labels.ndim == 2:
            fix = "; one-hot or soft labels: pass labels.argmax(dim=1)"
        elif labels.is_floating_point() or labels.dtype == torch.bool:
            fix = "; pass labels.long()"
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
        or labels.shape != (count,)
    ):
        raise ValueError(
            f"{where} must yield labels as integer class indices [{count}], one per image, got "
            f"{_describe(labels)}{fix}"
        )


def _check_label_range(labels: Tensor, where: str, num_classes: int) -> None:
    # PyTorch has no aminmax for uint16 and wider.
    low, high = (int(v) for v in labels.to(torch.int64).aminmax())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{where} must yield labels in 0..{num_classes - 1} (the head has {num_classes} "
            f"classes), got {wrong}; check the label mapping"
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)
