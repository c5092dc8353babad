"""Records the result of each epoch, read from the device once it is there."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from .progress import EpochRecord


@dataclass(frozen=True)
class _Entry:
    epoch: int
    lr: float
    images: int
    good_steps: int
    accuracy: float | None
    values: Tensor
    event: torch.cuda.Event | None
    seconds: float


class Ledger:
    """Records of epochs whose steps are queued but perhaps not done.

    Args:
        device: where the steps run.
        seconds: that the run had taken before.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = seconds
        self._started = time.perf_counter()
        self._start = self._mark()
        self._pending: deque[_Entry] = deque()

    def _mark(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def put(
        self,
        epoch: int,
        lr: float,
        images: int,
        expected: int,
        values: Tensor,
        accuracy: float | None = None,
    ) -> None:
        """Note an epoch (0-based) that has been queued.

        Args:
            images: in it.
            expected: steps of the run so far.
            values: [5] float64 on the device: summed loss, number correct, cosine, norm, good
                steps of the run so far.
            accuracy: measured after the epoch; None takes the number correct.
        """
        if self._cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
        seconds = self._seconds + time.perf_counter() - self._started
        entry = _Entry(epoch, lr, images, expected, accuracy, values, self._mark(), seconds)
        self._pending.append(entry)

    def ready(self, wait: bool) -> list[EpochRecord]:
        """The records that have come in since, in order; all of them with ``wait``.

        An epoch in which a step went wrong gives none, nor does any behind it.
        """
        out = []
        while self._pending and (wait or self._done(self._pending[0])):
            entry = self._pending.popleft()
            if entry.event is not None:
                entry.event.synchronize()
            loss, correct, cosine, norm, good_steps = entry.values.tolist()
            if good_steps != entry.good_steps:
                self._pending.clear()
                break
            accuracy = correct / entry.images if entry.accuracy is None else entry.accuracy
            out.append(
                EpochRecord(
                    *(entry.epoch + 1, loss / entry.images, accuracy, entry.lr, cosine, norm),
                    self._seconds_of(entry),
                )
            )
        return out

    @staticmethod
    def _done(entry: _Entry) -> bool:
        return entry.event is None or entry.event.query()

    def _seconds_of(self, entry: _Entry) -> float:
        if self._start is None or entry.event is None:
            return entry.seconds
        # The host's clock says when it was queued.
        return self._seconds + self._start.elapsed_time(entry.event) / 1000
