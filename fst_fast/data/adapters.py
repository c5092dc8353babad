"""Kinds of loaders, one adapter each: whoever takes batches asks the adapter, not the loader."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

Loader = Iterable[Any] | Callable[[], Iterable[Any]]

# Data sets keep images and labels under these names, the likeliest first.
IMAGES = ("pixel_values", "images", "image", "img", "imgs", "inputs", "input", "x")
LABELS = ("labels", "label", "targets", "target", "y", "class_labels", "fine_label")


class Adapter:
    """Any iterable of batches; each other kind of loader is a subclass.

    Attributes:
        loader: as it was given.
        fixed: whether every epoch has the same images in the same order.
        draws_ahead: whether random draws are made for batches that were not yet handed out.
    """

    fixed = False
    draws_ahead = False

    def __init__(self, loader: Any, where: str) -> None:
        self.loader = loader
        self.where = where

    @classmethod
    def takes(cls, loader: Any) -> bool:
        """Return whether the loader is of this kind."""
        return True

    def seek(self, epoch: int) -> None:
        """Make the next :meth:`open` give this epoch (0-based), where the loader knows epochs."""
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)

    def open(self) -> Iterable[Any]:
        """Return the iterable that the batches of an epoch come from."""
        return self._iterable(self.loader)

    def length(self) -> int | None:
        """Batches of an epoch; None where the loader does not tell."""
        try:
            return len(self.loader)
        except (TypeError, NotImplementedError):
            return None

    def sizes(self) -> list[int] | None:
        """Images in each batch of an epoch; None where the loader does not tell."""
        return None

    def _iterable(self, source: Any) -> Iterable[Any]:
        # These can be iterated, and what comes is no batch.
        wrong = nn.Module | str | bytes | Tensor | np.ndarray | np.generic | Mapping
        if not isinstance(source, Iterable) or isinstance(source, wrong):
            raise ValueError(
                f"{self.where} must be an iterable of (images, labels) batches, got "
                f"{type(source).__name__}; wrap a dataset in torch.utils.data.DataLoader"
            )
        return source


class FromList(Adapter):
    """A list or a tuple of batches."""

    fixed = True

    @classmethod
    def takes(cls, loader: Any) -> bool:
        return isinstance(loader, list | tuple)

    def sizes(self) -> list[int] | None:
        pairs = [as_pair(batch) for batch in self.loader]
        if not all(isinstance(found[0], Tensor) and found[0].dim() for found in pairs):
            return None
        return [len(found[0]) for found in pairs]


class FromDevice(Adapter):
    """A :class:`~fst_fast.DeviceLoader` itself: a subclass may yield whatever it likes."""

    @classmethod
    def takes(cls, loader: Any) -> bool:
        from .device_loader import DeviceLoader

        return type(loader) is DeviceLoader

    def sizes(self) -> list[int] | None:
        return list(self.loader.batch_sizes())


class FromTorch(Adapter):
    """A DataLoader of PyTorch; its samplers are told the epoch."""

    @classmethod
    def takes(cls, loader: Any) -> bool:
        return isinstance(loader, DataLoader)

    def seek(self, epoch: int) -> None:
        for owner in (self.loader, self.loader.sampler, self.loader.batch_sampler):
            set_epoch = getattr(owner, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)

    def sizes(self) -> list[int] | None:
        loader = self.loader
        if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
            return None
        try:
            count, size = len(loader.sampler), int(loader.batch_size)
        except (TypeError, NotImplementedError):
            return None
        whole, rest = divmod(count, size)
        return [size] * whole + ([rest] if rest and not loader.drop_last else [])


class FromHost(Adapter):
    """A :class:`~fst_fast.data.prefetch.HostLoader`, whose thread is ahead of its batches."""

    draws_ahead = True

    @classmethod
    def takes(cls, loader: Any) -> bool:
        from .prefetch import HostLoader

        return isinstance(loader, HostLoader)

    def sizes(self) -> list[int] | None:
        return adapt(self.loader.loader, self.where).sizes()


class FromFunction(Adapter):
    """A function that returns a fresh iterable for each epoch."""

    @classmethod
    def takes(cls, loader: Any) -> bool:
        return callable(loader) and not isinstance(loader, nn.Module)

    def open(self) -> Iterable[Any]:
        try:
            inspect.signature(self.loader).bind()
        except TypeError as error:
            raise ValueError(
                f"{self.where} must be callable without arguments where it is a function, got "
                f"{getattr(self.loader, '__name__', type(self.loader).__name__)}: {error}; use "
                "functools.partial or a lambda"
            ) from None
        except ValueError:
            # Builtins may have no signature that Python can see.
            pass
        return self._iterable(self.loader())


KINDS: tuple[type[Adapter], ...] = (FromList, FromDevice, FromHost, FromTorch, FromFunction)


def adapt(loader: Any, where: str) -> Adapter:
    """The adapter of this loader's kind; ``where`` is named in errors."""
    kind = next((kind for kind in KINDS if kind.takes(loader)), Adapter)
    return kind(loader, where)


def as_pair(batch: Any) -> Any:
    """A batch as (images, labels, ...) where it is a mapping of known names; else as it is."""
    if not isinstance(batch, Mapping):
        return batch
    found = [next((batch[n] for n in names if n in batch), None) for names in (IMAGES, LABELS)]
    return batch if found[0] is None or found[1] is None else tuple(found)


def pair(batch: Any, where: str) -> Any:
    """:func:`as_pair`; a mapping without such names is refused.

    Raises:
        ValueError: names the keys that came.
    """
    found = as_pair(batch)
    if isinstance(found, Mapping):
        keys = ", ".join(map(str, found))[:200] or "no keys"
        raise ValueError(
            f"{where} must yield (images, labels), got a {type(batch).__name__} of {keys}; adapt "
            "it: lambda: ((b['pixel_values'], b['labels']) for b in loader)"
        )
    return found


def single(batch: Any) -> bool:
    """Return whether a batch that is one has a single image."""
    whole = isinstance(batch, tuple | list) and len(batch) >= 2
    return whole and all(isinstance(part, Tensor) and len(part) == 1 for part in batch[:2])
