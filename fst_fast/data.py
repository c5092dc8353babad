"""Batches from a dataset of stored bytes that stays in memory: index, augment, normalise."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Normalization = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Augment:
    """Per-sample augmentation on stored bytes: zero-pad, random crop to size, random flip.

    Args:
        pad: zero pixels added on each side before the crop; 0 crops nothing.
        flip: mirror each image left to right with probability 1/2.
    """

    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"Augment: pad must be >= 0, got {self.pad}")


def _per_channel(values: Sequence[float], channels: int, device: torch.device) -> Tensor:
    row = tuple(float(v) for v in values) if isinstance(values, Iterable) else ()
    if len(row) != channels:
        raise ValueError(
            f"normalize: must be (mean, std), each with one value per channel ({channels}), got "
            f"{values} for one of them"
        )
    return _constant(row, device).view(1, channels, 1, 1)


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept on the device: copying it there for every batch would wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def normalize_bytes(images: Tensor, normalize: Normalization | None) -> Tensor:
    """Stored bytes to the network's input, as ToTensor and Normalize of torchvision do it.

    Args:
        images: [N, H, W, C] uint8.
        normalize: (mean, std) per channel in units of 0..1; None leaves 0..1.
    Returns:
        [N, C, H, W] float32 in channels-last memory, ``(x / 255 - mean) / std``.
    """
    out = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
    if normalize is not None:
        mean, std = (_per_channel(v, images.shape[-1], images.device) for v in normalize)
        out.sub_(mean).div_(std)
    return out


def normalize_table(
    channels: int, normalize: Normalization | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What :func:`normalize_bytes` makes of each byte, for :func:`fst_fast.ops.inject`.

    Returns:
        [channels, 256] in ``dtype``, on the CPU; computed in float32 and rounded once.
    """
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 1, channels)
    return normalize_bytes(levels, normalize).flatten(1).t().to(dtype).contiguous()


def _pixels(images: Tensor, normalize: Normalization | None) -> Tensor:
    """[N, C, H, W] network inputs in units of 0..1."""
    if normalize is None:
        return images.float()
    mean, std = (_per_channel(v, images.shape[1], images.device) for v in normalize)
    return images.float() * std + mean


def pixel_range(images: Tensor, normalize: Normalization | None) -> tuple[Tensor, Tensor]:
    """Least and greatest pixel of [N, C, H, W] network inputs in units of 0..1, 0-d each."""
    low, high = _pixels(images, normalize).aminmax()
    return low, high


def recover_bytes(images: Tensor, normalize: Normalization | None) -> Tensor:
    """The inverse of :func:`normalize_bytes`: [N, C, H, W] floats to [N, H, W, C] uint8.

    Rounded to the nearest byte, so that it is exact for images that came from bytes.
    """
    pixels = _pixels(images, normalize)
    return pixels.mul(255).round().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


class DeviceLoader:
    """Iterate over images that are held as bytes on one device.

    Every draw (order, crops, flips) comes from ``seed`` and the epoch's number alone, so a run
    can be repeated. Each ``iter()`` starts the next epoch; :meth:`set_epoch` goes to any.

    Args:
        images: [M, H, W, C] uint8.
        labels: [M] integers.
        batch_size: images in a batch.
        shuffle: draw a new order for each epoch.
        drop_last: leave out an incomplete last batch.
        device: where the bytes are held and the batches appear; None keeps the images' device.
        seed: of all draws.
        augment: None, "cifar" (zero-pad 4, random crop, flip) or an :class:`Augment`.
        normalize: (mean, std), each one value per channel in units of 0..1; None leaves 0..1.
    Yields:
        images [B, C, H, W] float32 in channels-last memory, and labels [B] int64.
    Raises:
        ValueError: an argument differs from the above.
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
        normalize: Normalization | None = None,
    ) -> None:
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
            raise ValueError(
                "DeviceLoader: images must be uint8 [M, H, W, C] with C in 1, 3, 4, got "
                f"{images.dtype} {list(images.shape)}"
            )
        if (
            labels.shape != images.shape[:1]
            or labels.is_floating_point()
            or labels.dtype == torch.bool
        ):
            raise ValueError(
                f"DeviceLoader: labels must be integers [{len(images)}], one per image, got "
                f"{labels.dtype} {list(labels.shape)}"
            )
        if batch_size < 1:
            raise ValueError(f"DeviceLoader: batch_size must be >= 1, got {batch_size}")
        self.device = torch.device(device) if device is not None else images.device
        self.images = images.to(self.device).contiguous()
        self.labels = labels.to(self.device, torch.int64)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.augment = _resolve_augment(augment)
        self.normalize = normalize
        self._epoch = 0
        # Raises here, rather than at the first batch, where normalize does not fit.
        normalize_bytes(self.images[:0], normalize)

    def __len__(self) -> int:
        if self.drop_last:
            return len(self.images) // self.batch_size
        return -(-len(self.images) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Make the next ``iter()`` produce this epoch (0-based)."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        return self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.images)
        # Drawn on the CPU for all devices alike: the same seed gives the same batches everywhere.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        table = _draw(self.augment, count, generator).to(self.device)
        order = order.to(self.device)
        for batch in range(len(self)):
            rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            images = self.images[order[rows]]
            if self.augment is not None:
                images = _augment(images, table[rows], self.augment.pad)
            yield normalize_bytes(images, self.normalize), self.labels[order[rows]]


def _resolve_augment(augment: Augment | str | None) -> Augment | None:
    if augment == "cifar":
        return Augment()
    if augment is None or isinstance(augment, Augment):
        return augment
    raise ValueError(f'DeviceLoader: augment must be None, "cifar" or an Augment, got {augment!r}')


def _draw(augment: Augment | None, count: int, generator: torch.Generator) -> Tensor:
    """[count, 3] int64: crop row, crop column, flip, one row per sample of an epoch."""
    if augment is None:
        return torch.zeros(count, 3, dtype=torch.int64)
    crops = torch.randint(0, 2 * augment.pad + 1, (count, 2), generator=generator)
    flips = torch.randint(0, 2, (count, 1), generator=generator) * int(augment.flip)
    return torch.cat([crops, flips], dim=1)


def _augment(images: Tensor, table: Tensor, pad: int) -> Tensor:
    """Crop and flip [B, H, W, C] bytes as the rows of the table say."""
    _, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    row, column, flip = table.unbind(1)
    rows = row[:, None] + torch.arange(height, device=images.device)  # [B, H]
    ahead = torch.arange(width, device=images.device)
    ahead = torch.where(flip[:, None] > 0, width - 1 - ahead, ahead)
    columns = column[:, None] + ahead  # [B, W]
    sample = torch.arange(len(images), device=images.device)
    return padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]]
