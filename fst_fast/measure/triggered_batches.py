"""Images as they are and triggered, for evaluation: of any loader, or from stored bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..data.batches import Batches, check_batch
from ..data.device_loader import DeviceLoader
from ..triggers import Trigger
from ..triggers.lower import looked_up, lower
from ..triggers.pixels import Normalization, normalize_bytes, recover_bytes

# A batch of so many numbers fills a GPU, whatever the loader's batches are.
ON_A_GPU = 2**22

# Images and labels of a batch, and a function from a trigger's place in the list to its images.
Shown = tuple[Tensor, Tensor, Callable[[int], Tensor]]


def show(
    batches: Batches,
    triggers: Sequence[Trigger],
    normalize: Normalization | None,
    device: torch.device,
) -> Iterator[Shown]:
    """Every image once, with a way to see it under each trigger.

    Yields:
        images [B, C, H, W] and labels [B] int64 on the device; the function gives [B, C, H, W].
    """
    loader = batches.loader
    if type(loader) is not DeviceLoader or not _is_plain(loader, device):
        return _from_loader(batches, triggers, normalize, device)
    if not triggers or normalize == loader.normalize:
        return _from_bytes(loader, triggers)
    # The caller knows better what the bytes are.
    return _from_loader(batches, triggers, normalize, device)


def _is_plain(loader: DeviceLoader, device: torch.device) -> bool:
    """Return whether its batches are the stored images in their order, and nothing else."""
    return (
        loader.resident
        and _is_on(loader, device)
        and loader.augment is None
        and not loader.shuffle
        and not loader.mask.any()
        and sum(loader.batch_sizes()) == len(loader.images)
    )


def _is_on(loader: DeviceLoader, device: torch.device) -> bool:
    # An empty tensor knows which GPU "cuda" is.
    return loader.images.device == torch.empty(0, device=device).device


def _from_loader(
    batches: Batches,
    triggers: Sequence[Trigger],
    normalize: Normalization | None,
    device: torch.device,
) -> Iterator[Shown]:
    """Triggers go on bytes, which are recovered from the loader's images."""
    seen = 0
    for images, labels in _joined(_on_device(batches, device), device):
        keys = torch.arange(seen, seen + len(images), device=device)
        stored: list[Tensor] = []

        def triggered(
            t: int, images: Tensor = images, keys: Tensor = keys, stored: list[Tensor] = stored
        ) -> Tensor:
            if not stored:
                stored.append(recover_bytes(images, normalize))
            return normalize_bytes(triggers[t].apply(stored[0], keys), normalize)

        yield images, labels, triggered
        seen += len(images)


def _on_device(batches: Batches, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches, checked. Resident bytes give batches of the size asked for."""
    loader = batches.loader
    if type(loader) is DeviceLoader and loader.resident and _is_on(loader, device):
        size = rows_at_once(loader.images[0], device)
        if size > loader.batch_size:
            params = loader.epoch_params(0)[: sum(loader.batch_sizes())].to(device)
            yield from (loader.gather(rows) for rows in params.split(size))
            return
    for batch in batches.epoch(0):
        images, labels = check_batch(batch, batches.where, device)
        # The model's dtype comes later: half precision may be too coarse to recover bytes from.
        yield (
            images.to(device, non_blocking=True),
            labels.to(device, torch.int64, non_blocking=True),
        )


def _joined(
    batches: Iterator[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in a row as one, as long as they are alike and :func:`rows_at_once` allows."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        images, count = batch[0], len(batch[1])
        most, rows = rows_at_once(images[0], device), sum(len(labels) for _, labels in waiting)
        if waiting and not (_alike(images, waiting[0][0]) and rows + count <= most):
            yield _as_one(waiting)
            waiting, rows = [], 0
        waiting.append(batch)
        # The next one is likely to be of the same size: nobody waits for it in vain.
        if rows + 2 * count > most:
            yield _as_one(waiting)
            waiting = []
    if waiting:
        yield _as_one(waiting)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape[1:] == other.shape[1:] and one.dtype == other.dtype


def _as_one(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(batches) == 1:
        return batches[0]
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def rows_at_once(image: Tensor, device: torch.device) -> int:
    """Return how many images fill the device; 0 where a batch of any size does."""
    return ON_A_GPU // image.numel() if device.type == "cuda" else 0


def _from_bytes(loader: DeviceLoader, triggers: Sequence[Trigger]) -> Iterator[Shown]:
    """One pass of ``inject`` for each; the same bytes, as tables and ``apply`` cannot differ."""
    images = loader.images
    shape = (images.shape[1], images.shape[2], images.shape[3])
    apart = [looked_up(trigger, shape) for trigger in triggers]
    tables = lower(triggers, shape, device=images.device)
    params = loader.epoch_params(0).to(images.device)
    size = max(loader.batch_size, rows_at_once(images[0], images.device))
    for rows in params.split(size):

        def triggered(t: int, rows: Tensor = rows) -> Tensor:
            marked = rows.clone()
            if not apart[t]:
                marked[:, 4] = t
                return loader.gather(marked, tables)[0]
            source = rows[:, 0].long()
            marked[:, 0] = torch.arange(len(rows), device=rows.device)
            changed = triggers[t].apply(images[source], source)
            return loader.gather(marked, images=changed)[0]

        yield *loader.gather(rows), triggered
