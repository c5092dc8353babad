"""Sources of a step's batch, which the host stages and the device takes."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..data.batches import Batches, check_batch
from ..data.device_loader import DeviceLoader
from .run_state import RunState

Place = Callable[[Tensor], Tensor]


class Feed(Protocol):
    """Batches in two halves, so that the second can be recorded once and replayed.

    Attributes:
        gives_features: whether a batch is the head's input rather than the model's.
        watched: whether ``digest`` is wanted.
        digest: a number that tells what was staged last from other batches; 0 where that would
            wait for the device.
    """

    gives_features: bool
    watched: bool
    digest: int

    def epoch(self, epoch: int) -> Iterator[tuple[Hashable, int, int]]:
        """Stage the batches of an epoch, as they are asked for.

        Yields their kind, which says all that the device's half depends on, the size of each, and
        how many of them now follow one another without the host.
        """

    def take(self, kind: Hashable) -> tuple[Tensor, Tensor]:
        """The staged batch: images or features, and labels int64, on the device."""

    def advance(self, kind: Hashable) -> None:
        """The staged batch has been used; a device operation too."""

    def register(self, state: RunState) -> None:
        """Add what :meth:`advance` changes."""


class LoaderFeed:
    """Any loader: each batch is checked, moved and, where ``keeps``, copied to one place.

    Args:
        batches: the loader.
        place: puts images on the device, in the weights' dtype and layout.
        device: for the labels.
        classes: labels must lie in 0..classes-1; on a GPU that is looked at there.
        keeps: batches of one shape take the same memory, as a replayed step needs.
    """

    gives_features, watched, digest = False, False, 0

    def __init__(
        self, batches: Batches, place: Place, device: torch.device, classes: int, keeps: bool
    ) -> None:
        self._batches, self._place, self._device = batches, place, device
        self._classes, self._keeps = classes, keeps
        self._held: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def epoch(self, epoch: int) -> Iterator[tuple[Hashable, int, int]]:
        for batch in self._batches.epoch(epoch):
            images, labels = check_batch(
                batch, self._batches.where, self._device, self._classes, values=epoch == 0
            )
            if self.watched:
                self.digest = _digest_of(images, labels)
            kind = tuple(images.shape)
            held = self._held.get(kind) if self._keeps else None
            if held is None:
                if not self._keeps:
                    self._held.clear()
                self._held[kind] = self._moved(images, labels)
            else:
                held[0].copy_(images, non_blocking=True)
                held[1].copy_(labels, non_blocking=True)
            yield kind, len(images), 1

    def _moved(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        there, named = self._place(images), labels.to(self._device, torch.int64, non_blocking=True)
        if not self._keeps:
            return there, named
        # The loader's own tensors must not be kept: the next batch will be written here.
        return there.clone(), named.clone()

    def take(self, kind: Hashable) -> tuple[Tensor, Tensor]:
        return self._held[kind]

    def advance(self, kind: Hashable) -> None:
        """The next batch is the host's to stage."""

    def register(self, state: RunState) -> None:
        """Nothing on the device changes."""


class _TableFeed:
    """Batches that are rows of a table, one after the other by a counter on the device.

    Args:
        rows: [N, columns] on the device, filled anew for every epoch.
        sizes: of an epoch's batches.
    """

    gives_features, watched, digest = False, False, 0

    def __init__(self, rows: Tensor, sizes: list[int]) -> None:
        self._rows, self._sizes = rows, sizes
        self._offsets = torch.arange(max(sizes), device=rows.device)
        self._at = torch.zeros((), dtype=torch.int64, device=rows.device)

    def _table(self, epoch: int) -> Tensor:
        """[N, columns] of an epoch, on the CPU."""
        raise NotImplementedError

    def epoch(self, epoch: int) -> Iterator[tuple[Hashable, int, int]]:
        table = self._table(epoch)[: len(self._rows)]
        if self.watched:
            self.digest = _digest_of(table)
        # From pinned memory nothing waits for the device.
        table = table.pin_memory() if self._rows.is_cuda else table
        self._rows.copy_(table, non_blocking=True)
        self._at.zero_()
        for size, equals in itertools.groupby(self._sizes):
            yield size, size, len(list(equals))

    def _taken(self, kind: Hashable) -> Tensor:
        assert isinstance(kind, int)
        return self._rows.index_select(0, self._at + self._offsets[:kind])

    def advance(self, kind: Hashable) -> None:
        assert isinstance(kind, int)
        self._at += kind

    def register(self, state: RunState) -> None:
        state.add("feed.at", self._at, "other", saved=False)


class ResidentFeed(_TableFeed):
    """A DeviceLoader whose bytes are on the device: gathered and augmented within the step.

    Args:
        loader: resident, on the model's device, its labels classes of the model.
        place: puts images into the weights' dtype and layout.
        sizes: of an epoch's batches.
    """

    def __init__(self, loader: DeviceLoader, place: Place, sizes: list[int]) -> None:
        super().__init__(torch.zeros(sum(sizes), 8, dtype=torch.int32, device=loader.device), sizes)
        self._loader, self._place = loader, place

    def _table(self, epoch: int) -> Tensor:
        return self._loader.epoch_params(epoch)

    def take(self, kind: Hashable) -> tuple[Tensor, Tensor]:
        images, labels = self._loader.gather(self._taken(kind))
        return self._place(images), labels


class FeatureFeed(_TableFeed):
    """The head's input for images that are the same in every epoch, computed once.

    Args:
        features: [N, D] on the device.
        labels: [N] int64.
        sizes: of an epoch's batches.
        order: [N] the rows in an epoch's order; None takes them as they are.
    """

    gives_features = True

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        sizes: list[int],
        order: Callable[[int], Tensor] | None,
    ) -> None:
        super().__init__(
            torch.zeros(sum(sizes), 1, dtype=torch.int64, device=features.device), sizes
        )
        self._features, self._labels, self._order = features, labels, order

    def _table(self, epoch: int) -> Tensor:
        order = torch.arange(len(self._features)) if self._order is None else self._order(epoch)
        return order[:, None]

    def take(self, kind: Hashable) -> tuple[Tensor, Tensor]:
        rows = self._taken(kind).flatten()
        return self._features.index_select(0, rows), self._labels.index_select(0, rows)


def _digest_of(*tensors: Tensor) -> int:
    """A checksum (CRC-32) that differs where the tensors, or some 64k elements of each, do."""
    digest = 0
    for tensor in tensors:
        if tensor.device.type == "cpu":
            if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
                tensor = tensor.permute(0, 2, 3, 1)
            some = tensor.flatten()[:: max(1, tensor.numel() // 2**16)].contiguous()
            digest = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), digest)
    return digest


def open_feed(
    batches: Batches, place: Place, device: torch.device, classes: int, keeps: bool
) -> Feed:
    """The fastest feed for a loader that gives the loader's own batches."""
    loader = batches.loader
    # A subclass may yield whatever it likes.
    if type(loader) is DeviceLoader and loader.resident and loader.batch_sizes():
        here = loader.images.device == torch.empty(0, device=device).device
        # A label that is no class is told by the ordinary way, in words.
        if here and loader.greatest_label < classes:
            return ResidentFeed(loader, place, batches.sizes() or [])
    return LoaderFeed(batches, place, device, classes, keeps)


def cache_features(
    batches: Batches, features_of: Callable[[Tensor], Tensor | None], feed: Feed
) -> Feed:
    """The feed with the head's input computed once, where every epoch has the same images.

    They are the same in a list of batches and in a DeviceLoader without augmentation.

    Args:
        batches: of which the feed is made.
        features_of: features of images that have been placed, in eval mode; None where there are
            none.
        feed: returned as it is where the images differ by epoch.
    """
    loader = batches.loader
    order = None
    if isinstance(feed, ResidentFeed) and isinstance(loader, DeviceLoader):
        if loader.augment is not None or (batches.images() or 0) < len(loader.images):
            return feed
        order = functools.partial(_order_of, loader)
    elif not batches.adapter.fixed:
        return feed
    features, labels, sizes = [], [], []
    for kind, size, count in feed.epoch(0):
        for _ in range(count):
            images, named = feed.take(kind)
            found = features_of(images)
            if found is None:
                return feed
            # These are copied: they may be the loader's own, or overwritten by the next batch.
            features.append(found.clone())
            labels.append(named.clone())
            sizes.append(size)
            feed.advance(kind)
    rows, names = torch.cat(features), torch.cat(labels)
    if order is not None:
        # The table is in the dataset's order rather than in that of the first epoch.
        back = torch.argsort(order(0)).to(rows.device)
        rows, names = rows[back], names[back]
    return FeatureFeed(rows, names, sizes, order)


def _order_of(loader: DeviceLoader, epoch: int) -> Tensor:
    return loader.epoch_params(epoch)[:, 0].long()
