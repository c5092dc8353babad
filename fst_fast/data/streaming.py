"""Batches of stored bytes for a device that cannot hold them all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

# Images may take this share of the device's free memory: the rest is for the model.
MOST_OF_DEVICE = 0.5


def fits(images: Tensor, device: torch.device) -> bool:
    """Return whether the device has room for the images; says so where it has not."""
    if device.type != "cuda" or images.device.type == "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    if images.nbytes <= MOST_OF_DEVICE * free:
        return True
    warnings.warn(
        f"DeviceLoader: {images.nbytes / 2**30:.1f} GiB of images stay in host memory, as "
        f"{device} has {free / 2**30:.1f} GiB free; each batch is uploaded while the one before "
        "is in use",
        stacklevel=3,
    )
    return False


def uploaded(
    images: Tensor, stored: Tensor, params: Tensor, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch's own images on the device, and the params that count them from 0.

    Args:
        images: [M, H, W, C] uint8 on the CPU.
        stored: [N, H, W, C] uint8 on the CPU; source M + i of the params means ``stored[i]``.
        params: [E, 8] int32 on the CPU.
    Yields:
        [B, H, W, C] uint8 and [B, 8] int32 on the device, one batch ahead of what was asked for.
    """
    stage = _Stage(images, stored, batch_size, device)
    ahead: tuple[Tensor, Tensor] | None = None
    for rows in params.split(batch_size):
        following = stage.upload(rows)
        if ahead is not None:
            yield stage.ready(ahead)
        ahead = following
    if ahead is not None:
        yield stage.ready(ahead)


class _Stage:
    """Two buffers in host memory, from which a stream of its own copies to the device."""

    def __init__(
        self, images: Tensor, stored: Tensor, batch_size: int, device: torch.device
    ) -> None:
        self.images, self.stored, self.device = images, stored, device
        self.streams = device.type == "cuda"
        shape = (batch_size, *images.shape[1:])
        self.buffers = [
            torch.empty(shape, dtype=torch.uint8, pin_memory=self.streams) for _ in range(2)
        ]
        self.stream = torch.cuda.Stream(device) if self.streams else None
        self.copied = [torch.cuda.Event() for _ in range(2)] if self.streams else []
        self.turn = 0

    def upload(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        self.turn = 1 - self.turn
        if self.stream is None:
            # The caller may keep a batch, and a copy from CPU to CPU is no copy.
            buffer = torch.empty_like(self.buffers[0][: len(rows)])
        else:
            self.copied[self.turn].synchronize()
            buffer = self.buffers[self.turn][: len(rows)]
        params = self._fill(buffer, rows)
        if self.stream is None:
            return buffer.to(self.device), params.to(self.device)
        with torch.cuda.stream(self.stream):
            moved = buffer.to(self.device, non_blocking=True)
            params = params.pin_memory().to(self.device, non_blocking=True)
            self.copied[self.turn].record()
        return moved, params

    def ready(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The batch, for use on the current stream."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor in batch:
                tensor.record_stream(current)
        return batch

    def _fill(self, buffer: Tensor, rows: Tensor) -> Tensor:
        source, count = rows[:, 0].long(), len(self.images)
        torch.index_select(self.images, 0, source.clamp(max=count - 1), out=buffer)
        looked_up = torch.nonzero(source >= count).flatten()
        if len(looked_up):
            buffer[looked_up] = self.stored[source[looked_up] - count]
        params = rows.clone()
        params[:, 0] = torch.arange(len(rows), dtype=torch.int32)
        return params
