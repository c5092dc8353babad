"""The tuning loop: precision, layout, the step, its guard against NaN, and the metrics."""

from __future__ import annotations

import math
import signal
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .heads import logits_of
from .inputs import Batches, autocast, check_batch
from .methods import HeadState, Method
from .progress import EpochRecord, ProgressReport

Callback = Callable[[EpochRecord, nn.Module], bool | None]


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs; every field is resolved, none is "auto"."""

    epochs: int
    lr: float
    momentum: float
    device: torch.device
    precision: str
    channels_last: bool
    backend: str | None


class Guard:
    """Keeps NaN and Inf out of the weights without waiting for the device.

    ``found_inf`` goes to the optimizer and to ``head_step_``, which leave everything as it is
    where it is not zero. It stays set after a loss, gradient or buffer that is not finite, so that
    nothing moves until the host has noticed; with a loss scale (fp16), an overflow of the gradients
    alone skips one step and lowers the scale. On a GPU the host reads the flag of the step before,
    so that the device always has a step to work on; buffers (batch-norm statistics) are kept from
    before the last two steps and put back.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, precision: str, lag: int | None = None
    ) -> None:
        self.scales = precision == "fp16"
        self.scale = torch.full((), 2.0**16 if self.scales else 1.0, device=device)
        self.found_inf = torch.zeros((), device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device)
        self._fatal = torch.zeros((), device=device)
        self._buffers = list(model.buffers())
        self._statistics = [b for b in self._buffers if b.is_floating_point()]
        self._one = torch.ones((), device=device)
        self._kept = [[b.clone() for b in self._buffers] for _ in range(2)]
        pinned = device.type == "cuda"
        self._lag = int(pinned) if lag is None else lag
        self._seen = [torch.zeros((), pin_memory=pinned) for _ in range(2)]
        self._events = [torch.cuda.Event() if pinned else None for _ in range(2)]
        self._step = 0

    def before_step(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._kept[self._step % 2], self._buffers)

    def inspect(self, loss: Tensor, grads: list[Tensor]) -> None:
        """Unscale the gradients in place and set ``found_inf``."""
        self._fatal += loss.isfinite().logical_not()
        _scale_and_check(self._statistics, self._one, self._fatal)
        self.found_inf.zero_()
        _scale_and_check(grads, self.scale.reciprocal(), self.found_inf)
        if not self.scales:
            self._fatal += self.found_inf
        # The fused optimizers compare with 1 exactly.
        self._fatal.clamp_(max=1)
        if self.scales:
            torch._amp_update_scale_(self.scale, self._growth, self.found_inf, 2.0, 0.5, 2000)
        torch.maximum(self.found_inf, self._fatal, out=self.found_inf)

    def after_step(self) -> bool:
        """Queue this step's flag for the host; True if a step that is done had gone wrong."""
        slot = self._step % 2
        self._seen[slot].copy_(self._fatal, non_blocking=True)
        event = self._events[slot]
        if event is not None:
            event.record()
        self._step += 1
        return self._step > self._lag and self._failed(self._step - 1 - self._lag)

    def finish(self) -> bool:
        """As :meth:`after_step`, for the steps still in flight."""
        return any(self._failed(s) for s in range(max(0, self._step - 1 - self._lag), self._step))

    def _failed(self, step: int) -> bool:
        event = self._events[step % 2]
        if event is not None:
            event.synchronize()
        if self._seen[step % 2].item() == 0:
            return False
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept[step % 2])
        return True


def _scale_and_check(tensors: list[Tensor], factor: Tensor, found: Tensor) -> None:
    """Multiply in place by a device scalar; set ``found`` to 1 where an element is not finite."""
    for dtype in {tensor.dtype for tensor in tensors}:
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        torch._amp_foreach_non_finite_check_and_unscale_(group, found, factor)


class Interrupts:
    """Turns the first Ctrl-C into a request to stop after the step; the second one raises."""

    def __init__(self) -> None:
        self.requested = False
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interrupts:
        if self._active:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous)


class Tuner:
    """One run of one method on one model.

    The model is changed in place. After :meth:`run`, ``history`` holds what was done and
    ``stopped`` says why it ended early, or is None.
    """

    def __init__(
        self, model: nn.Module, head: nn.Module, method: Method, settings: LoopSettings
    ) -> None:
        self.model = model
        self.method = method
        self.settings = settings
        self.head = HeadState(head)
        self.history: list[EpochRecord] = []
        self.stopped: str | None = None
        own = {id(p) for p in head.parameters()}
        backbone = [p for p in model.parameters() if id(p) not in own]
        self._tunes_head = method.trains != "backbone"
        self._tunes_backbone = method.trains != "head"
        for parameter in model.parameters():
            wanted = self._tunes_head if id(parameter) in own else self._tunes_backbone
            parameter.requires_grad_(wanted)
        self._head_parameters = [p for p in head.parameters() if self._tunes_head]
        self._backbone = backbone if self._tunes_backbone else []
        self._lr = torch.tensor(settings.lr, device=settings.device)
        self._optimizer = self._make_optimizer() if self._backbone else None
        self._guard = Guard(model, settings.device, settings.precision)
        self._recent: deque[Tensor] = deque(maxlen=2)

    def _make_optimizer(self) -> torch.optim.SGD:
        optimizer = torch.optim.SGD(
            self._backbone, lr=self._lr, momentum=self.settings.momentum, fused=True
        )
        if self.settings.momentum:
            for parameter in self._backbone:
                # Zeros from the start: a first step skipped by the guard then leaves no garbage.
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def run(
        self,
        batches: Batches,
        report: ProgressReport,
        validate: Callable[[nn.Module], float] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Tune for all epochs, or until a callback, Ctrl-C or a loss that is not finite."""
        started = time.perf_counter()
        with Interrupts() as interrupts:
            for epoch in range(self.settings.epochs):
                lr = self.settings.lr * (1 + math.cos(math.pi * epoch / self.settings.epochs)) / 2
                self._lr.fill_(lr)
                totals = self._epoch(batches, epoch, interrupts)
                if totals is None:
                    return
                accuracy = totals[1] if validate is None else validate(self.model)
                cosine, norm = self.head.shift().tolist()
                seconds = time.perf_counter() - started
                record = EpochRecord(epoch + 1, totals[0], accuracy, lr, cosine, norm, seconds)
                self.history.append(record)
                report.epoch(record)
                answers = [callback(record, self.model) for callback in callbacks]
                if epoch + 1 == self.settings.epochs:
                    return
                if interrupts.requested:
                    self.stopped = f"interrupted after epoch {epoch + 1}"
                    return
                if any(answers):
                    self.stopped = f"a callback asked to stop after epoch {epoch + 1}"
                    return

    def _epoch(
        self, batches: Batches, epoch: int, interrupts: Interrupts
    ) -> tuple[float, float] | None:
        """Mean loss and accuracy over one epoch; None where the run was stopped within it."""
        self.model.train(self._tunes_backbone)
        totals = torch.zeros(2, device=self.settings.device, dtype=torch.float64)
        count = step = 0
        try:
            for images, labels in self._checked(batches, epoch):
                step += 1
                count += len(images)
                self.step(images, labels, totals)
                if self._guard.after_step() or interrupts.requested:
                    break
        except RuntimeError:
            # Workers of a DataLoader end on the same Ctrl-C, which the loader reports as an error.
            if not interrupts.requested:
                raise
        where = f"epoch {epoch + 1}, step {step}"
        if self._guard.finish():
            self._explain_failure(where)
            return None
        if interrupts.requested:
            self.stopped = f"interrupted at {where}"
            return None
        if count == 0:
            raise ValueError(
                f"{batches.where} must yield batches in every epoch, got none in epoch "
                f"{epoch + 1}; return a fresh iterator each time"
            )
        loss, correct = (totals / count).tolist()
        return loss, correct

    def _checked(self, batches: Batches, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        classes = len(self.head.weight0)
        for batch in batches.epoch(epoch):
            yield check_batch(
                batch, batches.where, self.settings.device, classes, values=epoch == 0
            )

    def step(self, images: Tensor, labels: Tensor, totals: Tensor) -> None:
        """One step; adds the batch's summed loss and number correct to ``totals`` [2]."""
        settings, guard = self.settings, self._guard
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        images = images.to(
            settings.device, self.head.weight0.dtype, non_blocking=True, memory_format=layout
        )
        labels = labels.to(settings.device, torch.int64, non_blocking=True)
        self._recent.append(images)
        guard.before_step()
        with autocast(settings.device, settings.precision):
            logits = logits_of(self.model(images))
        logits = logits.flatten(1)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        loss = self.method.loss(logits, labels, self.head)
        self.model.zero_grad(set_to_none=True)
        (loss * guard.scale).backward()
        trained = self._backbone + self._head_parameters
        guard.inspect(loss.detach(), [p.grad for p in trained if p.grad is not None])
        self._update()
        with torch.no_grad():
            totals[0] += loss.detach() * len(images)
            totals[1] += (logits.argmax(1) == labels).sum()

    def _update(self) -> None:
        if self._optimizer is not None:
            self._optimizer.found_inf = self._guard.found_inf  # type: ignore[attr-defined]
            self._optimizer.step()
        if self._tunes_head or self.method.project:
            self.head.step(
                self._lr,
                self.settings.momentum,
                self.method.project,
                self._guard.found_inf,
                self.settings.backend,
            )

    def _explain_failure(self, where: str) -> None:
        """Say what was not finite; bad images are the caller's to mend, so they raise."""
        if not all(bool(images.isfinite().all()) for images in self._recent):
            raise ValueError(
                f"purify: loader must yield finite images, got NaN or Inf at {where}; the model "
                "was left as before that step; check the files and the normalisation"
            )
        self.stopped = (
            f"the loss or a gradient was not finite at {where}; the weights are those from before "
            "that step; try a lower lr, a lower alpha or precision='fp32'"
        )
