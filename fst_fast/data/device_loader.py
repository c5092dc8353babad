"""Batches from a dataset of stored bytes that stays in memory, by one pass of ``inject``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..ops import inject
from ..ops.inject import TriggerTables, no_triggers
from ..ops.inject_check import OUT_DTYPES
from ..triggers import Trigger
from ..triggers.lower import looked_up, lower
from ..triggers.pixels import Normalization, named_normalization
from ..triggers.poisoning import plan
from . import streaming as uploads
from .arguments import seed as checked_seed
from .arguments import whole
from .augment import Augment, draw, resolve
from .compute import existing_device
from .device_loader_check import as_tensor, byte_table, check_set
from .prefetch import HostLoader


class DeviceLoader:
    """Iterate over images that are held as bytes on one device.

    Every draw (order, crops, flips) comes from ``seed`` and the epoch's number alone, so a run
    can be repeated. Each ``iter()`` starts the next epoch; :meth:`set_epoch` goes to any.

    Args:
        images: [M, H, W, C] uint8.
        labels: [M] integers in 0..2^31-1.
        batch_size: images in a batch.
        shuffle: draw a new order for each epoch.
        drop_last: leave out an incomplete last batch.
        device: where the bytes are held and the batches appear; None keeps the images' device.
        seed: of all draws.
        augment: None, "cifar" (zero-pad 4, random crop, flip) or an :class:`Augment`.
        normalize: (mean, std), each one value per channel in units of 0..1, or the name of a
            known one: "cifar10", "imagenet"; None leaves 0..1. A tensor [C, 256] gives the input
            value of each byte itself.
        trigger: put on images before they are augmented; one, or several of which each poisoned
            image gets one.
        poisoned: which images: "all" (None means that too), a rate in 0..1, or a bool mask [M].
            See :func:`fst_fast.triggers.poisoning.plan` for this and the next three.
        target: the attacker's class.
        relabel: "all-to-one", "all-to-all" or "clean-label".
        cover: share of images that carry a trigger and keep their label.
        dtype: of the batches: float32, bfloat16 or float16.
        channels_last: memory layout of the batches; False for contiguous.
        resident: hold the bytes on the device. False keeps them in host memory and uploads each
            batch while the one before is in use. None holds them if they fit.
        backend: of :func:`fst_fast.ops.inject`; None takes the best available.
    Yields:
        images [B, C, H, W], and labels [B] int64.
    Raises:
        ValueError: an argument differs from the above.

    Example:
        >>> images = torch.zeros(5, 8, 8, 3, dtype=torch.uint8)
        >>> loader = fst_fast.DeviceLoader(images, torch.arange(5), 2, augment="cifar")
        >>> [batch.shape[0] for batch, labels in loader]
        [2, 2, 1]
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int = 128,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        seed: int = 0,
        augment: Augment | str | None = None,
        normalize: Normalization | str | Tensor | None = None,
        trigger: Trigger | Sequence[Trigger] | None = None,
        poisoned: str | float | Tensor | None = None,
        target: int = 0,
        relabel: str = "all-to-one",
        cover: float = 0.0,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        resident: bool | None = None,
        backend: str | None = None,
    ) -> None:
        images, labels = as_tensor(images, "images"), as_tensor(labels, "labels")
        check_set(images, labels)
        batch_size = whole("DeviceLoader", "batch_size", batch_size, 1)
        seed = checked_seed("DeviceLoader", seed)
        if not isinstance(dtype, torch.dtype) or dtype not in OUT_DTYPES:
            raise ValueError(
                f"DeviceLoader: dtype must be one of {', '.join(map(str, OUT_DTYPES))}, got {dtype}"
            )
        if trigger is None and (poisoned is not None or cover):
            raise ValueError(
                "DeviceLoader: trigger must be given to poison images, got None with poisoned="
                f"{poisoned} and cover={cover}"
            )
        self.device = images.device if device is None else existing_device(device)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.augment = resolve(augment)
        named = None if isinstance(normalize, Tensor) else named_normalization(normalize)
        self.normalize = named
        self.channels_last = channels_last
        self.backend = backend
        self._epoch = 0
        # A normalize that does not fit raises here rather than at the first batch.
        table = normalize if isinstance(normalize, Tensor) else named
        self._lut = byte_table(images.shape[-1], table, dtype).to(self.device)
        self.resident = uploads.fits(images, self.device) if resident is None else resident
        home = self.device if self.resident else torch.device("cpu")
        self.images = images.to(home).contiguous()
        self.labels = labels.to(self.device, torch.int64)
        self._poison(trigger, "all" if poisoned is None else poisoned, target, relabel, cover)

    @classmethod
    def from_loader(
        cls,
        loader: DataLoader[Any],
        device: torch.device | str | None = None,
        *,
        seed: int = 0,
        skip_corrupt: bool = False,
        **options: Any,
    ) -> DeviceLoader | HostLoader:
        """Lift a standard torchvision pipeline onto the device.

        CIFAR, GTSRB, ImageFolder and TensorDataset, or subsets of them, are recognised with
        ToTensor or ToImage and ToDtype, Normalize, RandomCrop with padding, RandomHorizontalFlip,
        Resize and CenterCrop to a fixed size. With augmentation off the batches are those of the
        DataLoader, to the last bit; with it on they have the same distribution.

        Args:
            loader: a torch DataLoader.
            device: where the batches appear; None is the GPU, if there is one.
            seed: of order, crops and flips.
            skip_corrupt: leave out image files that cannot be read, instead of raising.
            options: further arguments of :class:`DeviceLoader`, such as ``trigger``.
        Returns:
            A DeviceLoader. If the pipeline is not recognised, a warning says why, once, and the
            loader's own batches are moved to the device ahead of time.
        Raises:
            ValueError: an image file is corrupt, or options are given that only a lifted loader
                can take.
        """
        from .torch_pipeline.lift import lift

        place = existing_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        lifted = lift(loader, skip_corrupt=skip_corrupt)
        if isinstance(lifted, str):
            if options:
                raise ValueError(
                    f"from_loader: {', '.join(options)} must be left out, as the loader stays on "
                    f"the host: {lifted}"
                )
            warnings.warn(f"from_loader: left on the host: {lifted}", stacklevel=2)
            return HostLoader(loader, place)
        augment = Augment(lifted.pad, lifted.flip) if lifted.pad or lifted.flip else None
        out = cls(
            lifted.images,
            lifted.labels,
            lifted.batch_size,
            shuffle=lifted.shuffle,
            drop_last=lifted.drop_last,
            device=place,
            seed=seed,
            augment=augment,
            normalize=lifted.lut,
            **options,
        )
        out.normalize = lifted.normalize
        return out

    @property
    def greatest_label(self) -> int:
        """The greatest label of all images, poisoned ones included; -1 without any."""
        return int(self._fate[:, 1].max()) if len(self._fate) else -1

    def __len__(self) -> int:
        if self.drop_last:
            return len(self.images) // self.batch_size
        return -(-len(self.images) // self.batch_size)

    def batch_sizes(self) -> list[int]:
        """Images in each batch of an epoch."""
        count = min(len(self.images), len(self) * self.batch_size)
        return [min(self.batch_size, count - at) for at in range(0, count, self.batch_size)]

    def set_epoch(self, epoch: int) -> None:
        """Make the next ``iter()`` produce this epoch (0-based)."""
        self._epoch = epoch

    def plain(self, shuffle: bool = False) -> DeviceLoader:
        """Return a loader of all the same images without augmentation, in the same memory.

        What is poisoned stays so.

        Args:
            shuffle: draw the order anew in each epoch, instead of that in which they are stored.
        """
        out = copy.copy(self)
        out.augment, out.shuffle, out.drop_last, out._epoch = None, shuffle, False, 0
        return out

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        return self._batches(epoch)

    def epoch_params(self, epoch: int) -> Tensor:
        """[M, 8] int32 on the CPU: ``params`` of ``inject`` for all images in the epoch's order."""
        count = len(self.images)
        # The CPU draws for every device: the same seed gives the same batches everywhere.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        crops = draw(self.augment, count, generator)
        return torch.cat([self._source[order, None], crops, self._fate[order]], dim=1)

    def _poison(
        self,
        trigger: Trigger | Sequence[Trigger] | None,
        poisoned: str | float | Tensor,
        target: int,
        relabel: str,
        cover: float,
    ) -> None:
        """Sets the tables, and what params says of each image: _source [M] and _fate [M, 4]."""
        count = len(self.images)
        index = torch.arange(count, dtype=torch.int32)
        self._source, self._stored = index, self.images[:0]
        if trigger is None:
            none = torch.full_like(index, -1)
            self.mask = torch.zeros(count, dtype=torch.bool)
            self._tables = no_triggers(self.images[:0].to(self.device))
            self._fate = torch.stack([none, self.labels.int().cpu(), index * 0, index], dim=1)
            return
        planned = plan(
            self.labels,
            trigger,
            poisoned,
            target=target,
            relabel=relabel,
            cover=cover,
            seed=self.seed,
            where="DeviceLoader",
        )
        self.mask = planned.mask
        height, width, channels = self.images.shape[1:]
        shape = (height, width, channels)
        looks = torch.tensor([looked_up(t, shape) for t in planned.triggers], dtype=torch.bool)
        chosen, tiles, key = planned.trigger, planned.tiles, index.clone()
        rows = torch.nonzero((chosen >= 0) & looks[chosen.long()]).flatten()
        self._stored = planned.on(self.images, rows)
        # The stored images have been through their tiles.
        tiles[rows], key[rows] = 0, torch.arange(len(rows), dtype=torch.int32)
        if not self.resident:
            self._source = index.clone()
            self._source[rows] = count + key[rows]
            chosen[rows] = -1
        lookup = self._stored if self.resident else None
        self._tables = lower(planned.triggers, shape, device=self.device, lookup=lookup)
        self._fate = torch.stack([chosen, planned.labels.int(), tiles, key], dim=1)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        table = self.epoch_params(epoch)[: len(self) * self.batch_size]
        for images, params in self._sets(table):
            yield self.gather(params, images=images)

    def gather(
        self, params: Tensor, tables: TriggerTables | None = None, *, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The batch that these rows of :meth:`epoch_params` describe.

        Args:
            params: [B, 8] int32 on the device.
            tables: of the triggers that the rows name; None is the loader's own.
            images: what the rows count in; None is the resident images.
        """
        return inject(
            self.images if images is None else images,
            params,
            self._lut,
            self._tables if tables is None else tables,
            channels_last=self.channels_last,
            backend=self.backend,
        )

    def _sets(self, table: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """For each batch the images that its params count in."""
        if len(table) == 0:
            return ()
        if not self.resident:
            return uploads.uploaded(self.images, self._stored, table, self.batch_size, self.device)
        return ((self.images, rows) for rows in table.to(self.device).split(self.batch_size))
