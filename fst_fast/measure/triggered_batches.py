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

# Numbers in a batch on a GPU: enough to fill it, whatever the loader's batches are.
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
    """Whether its batches are the stored images in their order, and nothing else."""
    return (
        loader.resident
        and loader.images.device == torch.empty(0, device=device).device
        and loader.augment is None
        and not loader.shuffle
        and not loader.mask.any()
        and sum(loader.batch_sizes()) == len(loader.images)
    )


def _from_loader(
    batches: Batches,
    triggers: Sequence[Trigger],
    normalize: Normalization | None,
    device: torch.device,
) -> Iterator[Shown]:
    """Triggers go on bytes, which are recovered from the loader's images."""
    seen = 0
    for batch in batches.epoch(0):
        images, labels = check_batch(batch, batches.where, device)
        # Not yet in the model's dtype: half precision may be too coarse to recover bytes from.
        images = images.to(device, non_blocking=True)
        keys = torch.arange(seen, seen + len(images), device=device)
        stored: list[Tensor] = []

        def triggered(
            t: int, images: Tensor = images, keys: Tensor = keys, stored: list[Tensor] = stored
        ) -> Tensor:
            if not stored:
                stored.append(recover_bytes(images, normalize))
            return normalize_bytes(triggers[t].apply(stored[0], keys), normalize)

        yield images, labels.to(device, torch.int64, non_blocking=True), triggered
        seen += len(images)


def _from_bytes(loader: DeviceLoader, triggers: Sequence[Trigger]) -> Iterator[Shown]:
    """One pass of ``inject`` for each; the same bytes, as tables and ``apply`` cannot differ."""
    images = loader.images
    shape = (images.shape[1], images.shape[2], images.shape[3])
    apart = [looked_up(trigger, shape) for trigger in triggers]
    tables = lower(triggers, shape, device=images.device)
    params = loader.epoch_params(0).to(images.device)
    size = loader.batch_size
    if images.is_cuda:
        size = max(size, ON_A_GPU // images[0].numel())
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
