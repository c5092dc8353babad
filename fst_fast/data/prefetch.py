"""A loader that stays as it is: its batches are moved to the device ahead of time."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

# At most so many batches wait on the device.
AHEAD = 2
_END = object()


class HostLoader:
    """Iterate over a DataLoader's batches, moved to the device by a thread of their own.

    Args:
        loader: any sized iterable of (images, labels).
        device: where the batches appear.
    Yields:
        What the loader yields; images [B, C, H, W] become channels-last on a GPU.
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self.loader = loader
        self.device = device

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the loader's sampler, where that has epochs."""
        for owner in (self.loader, getattr(self.loader, "sampler", None)):
            set_epoch = getattr(owner, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        # A thread would gain nothing where nothing is moved.
        return self._ahead() if self.device.type == "cuda" else iter(self.loader)

    def _ahead(self) -> Iterator[Any]:
        ready: queue.Queue[Any] = queue.Queue(AHEAD)
        stop = threading.Event()
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        worker = threading.Thread(target=self._fill, args=(ready, stop, stream), daemon=True)
        worker.start()
        try:
            while (item := ready.get()) is not _END:
                if isinstance(item, BaseException):
                    raise item
                yield _handed_over(item, stream)
        finally:
            stop.set()
            # A thread that waits to put a batch down must find room, to see the stop.
            while worker.is_alive():
                with contextlib.suppress(queue.Empty):
                    ready.get(timeout=0.05)

    def _fill(
        self, ready: queue.Queue[Any], stop: threading.Event, stream: torch.cuda.Stream | None
    ) -> None:
        try:
            with torch.cuda.stream(stream):
                for batch in self.loader:
                    if stop.is_set():
                        break
                    ready.put(_moved(batch, self.device))
            ready.put(_END)
        except BaseException as error:
            # The error is raised where the batches are read.
            ready.put(error)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        batch = batch.pin_memory() if device.type == "cuda" else batch
        layout = torch.channels_last if batch.dim() == 4 else torch.preserve_format
        return batch.to(device, non_blocking=True, memory_format=layout)
    if isinstance(batch, list | tuple):
        return [_moved(part, device) for part in batch]
    return batch


def _handed_over(batch: Any, stream: torch.cuda.Stream | None) -> Any:
    """The batch, for use on the current stream."""
    if stream is not None:
        current = torch.cuda.current_stream(stream.device)
        current.wait_stream(stream)
        for part in batch if isinstance(batch, list) else [batch]:
            if isinstance(part, Tensor):
                part.record_stream(current)
    return batch
