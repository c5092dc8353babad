"""The tuning loop: precision, layout, the step and the metrics."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .averaging import WeightAverage, fresh_statistics
from .features import FeatureTap
from .guard import Guard
from .heads import logits_of
from .inputs import AUTOCAST, Batches, autocast, check_batch
from .methods import HeadState, Method
from .ops import head_deviation_loss
from .progress import EpochRecord, ProgressReport
from .state import Interrupts

# Heads of so many weights fall out of the caches: one pass fewer over them is a third of a step.
DEFERRED_FROM = 2**19

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
    threads: int | None
    backend: str | None


class Tuner:
    """One run of one method on one model.

    The model is changed in place. After :meth:`run`, ``history`` holds what was done and
    ``stopped`` says why it ended early, or is None.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        method: Method,
        settings: LoopSettings,
        tap: FeatureTap | None = None,
    ) -> None:
        self.model = model
        self.method = method
        self.settings = settings
        self.head = HeadState(head)
        share = method.course.average
        self.average = WeightAverage(model, share, settings.epochs) if share else None
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
        self.backbone = backbone if self._tunes_backbone else []
        # The head alone: in the first epochs of some methods.
        self._head_only = False
        self._lr = torch.tensor(settings.lr, device=settings.device)
        self._head_lr = self._lr.clone()
        self.optimizer = self._make_optimizer() if self.backbone else None
        self.guard = Guard(model, settings.device, settings.precision)
        self._recent: deque[Tensor] = deque(maxlen=2)
        # A method's own loss asks for logits.
        self._tap = tap if type(method).loss is Method.loss else None
        if self._tap is not None and method.project and self.head.weight.numel() >= DEFERRED_FROM:
            self.head.defer_scale()

    def _make_optimizer(self) -> torch.optim.SGD:
        optimizer = torch.optim.SGD(
            self.backbone, lr=self._lr, momentum=self.settings.momentum, fused=True
        )
        if self.settings.momentum:
            for parameter in self.backbone:
                # Zeros from the start: a first step skipped by the guard then leaves no garbage.
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def run(
        self,
        batches: Batches,
        report: ProgressReport,
        validate: Callable[[nn.Module], float] | None = None,
        callbacks: Sequence[Callback] = (),
        keep: Callable[[Tuner], None] | None = None,
    ) -> None:
        """Tune for all epochs, or until a callback, Ctrl-C or a loss that is not finite.

        Goes on behind the history, where there is one. ``keep`` is called after every epoch, before
        the callbacks.
        """
        started = time.perf_counter()
        average = self.average
        if self.history:
            started -= self.history[-1].seconds
        with Interrupts() as interrupts:
            for epoch in range(len(self.history), self.settings.epochs):
                lr = self._begin(epoch)
                totals = self._epoch(batches, epoch, interrupts)
                if totals is None:
                    return
                if average is not None and epoch >= average.first:
                    average.add()
                    if epoch + 1 == self.settings.epochs:
                        self._take_average(average, batches, epoch)
                accuracy = totals[1] if validate is None else validate(self.model)
                cosine, norm = self.head.shift().tolist()
                seconds = time.perf_counter() - started
                record = EpochRecord(epoch + 1, totals[0], accuracy, lr, cosine, norm, seconds)
                self.history.append(record)
                report.epoch(record)
                if keep is not None:
                    keep(self)
                answers = [callback(record, self.model) for callback in callbacks]
                if epoch + 1 == self.settings.epochs:
                    return
                if interrupts.requested:
                    self.stopped = f"interrupted after epoch {epoch + 1}"
                    return
                if any(answers):
                    self.stopped = f"a callback asked to stop after epoch {epoch + 1}"
                    return

    def _begin(self, epoch: int) -> float:
        """Set the learning rates of an epoch and what is trained in it; returns the former."""
        course, epochs = self.method.course, self.settings.epochs
        lr = self.settings.lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        self._lr.fill_(lr)
        self._head_lr.fill_(lr * course.head_lr)
        head_only = epoch < round(course.head_epochs * epochs)
        if head_only != self._head_only:
            self._head_only = head_only
            for parameter in self.backbone:
                parameter.requires_grad_(not head_only)
        return lr

    def _take_average(self, average: WeightAverage, batches: Batches, epoch: int) -> None:
        """Put the averaged weights in, the head at its norm, and measure batch norm for them."""
        average.put_in()
        if self.method.project:
            with torch.no_grad():
                self.head.weight.mul_(self.head.norm0 / self.head.weight.norm())
        with torch.no_grad(), fresh_statistics(self.model) as measuring:
            if measuring:
                for images, _ in self._checked(batches, epoch):
                    with autocast(self.settings.device, self.settings.precision):
                        self.model(self._placed(images))

    def _epoch(
        self, batches: Batches, epoch: int, interrupts: Interrupts
    ) -> tuple[float, float] | None:
        """Mean loss and accuracy over one epoch; None where the run was stopped within it."""
        self.model.train(self._tunes_backbone and not self._head_only)
        totals = torch.zeros(2, device=self.settings.device, dtype=torch.float64)
        count = step = 0
        try:
            for images, labels in self._checked(batches, epoch):
                step += 1
                count += len(images)
                self.step(images, labels, totals)
                if self.guard.after_step() or interrupts.requested:
                    break
        except RuntimeError:
            # Workers of a DataLoader end on the same Ctrl-C, which the loader reports as an error.
            if not interrupts.requested:
                raise
        finally:
            self.head.materialize()
        where = f"epoch {epoch + 1}, step {step}"
        if self.guard.finish():
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
        settings, guard = self.settings, self.guard
        images = self._placed(images)
        labels = labels.to(settings.device, torch.int64, non_blocking=True)
        self._recent.append(images)
        guard.before_step()
        loss, correct = self._loss(images, labels)
        self.model.zero_grad(set_to_none=True)
        (loss * guard.scale).backward()
        trained = self.backbone + self._head_parameters
        guard.inspect(loss.detach(), [p.grad for p in trained if p.grad is not None])
        self._update()
        with torch.no_grad():
            totals[0] += loss.detach() * len(images)
            totals[1] += correct

    def _placed(self, images: Tensor) -> Tensor:
        """The images on the device, in the weights' dtype and layout."""
        settings = self.settings
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        dtype = self.head.weight0.dtype
        return images.to(settings.device, dtype, non_blocking=True, memory_format=layout)

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the number correct, from features where the model allows it."""
        settings, head = self.settings, self.head
        hold = self.method.course.hold
        if hold is not None:
            head.hold_at(hold)
        with autocast(settings.device, settings.precision):
            if self._tap is not None:
                features = self._tap(images)
                if features is not None:
                    return self._fused_loss(features, labels)
                # In train mode the model does more than its head, after all.
                self._tap = None
                head.materialize()
                head.weight_scale = None
                self.guard.undo_forward()
            logits = logits_of(self.model(images)).flatten(1)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return self.method.loss(logits, labels, head), (logits.argmax(1) == labels).sum()

    def _fused_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        head = self.head
        penalty: float | Tensor = self.method.penalty
        if head.pressure is not None:
            penalty = head.pressure * penalty
        # Layers that autocast keeps in float32 may come last; the head's product is not one.
        dtype = AUTOCAST.get(self.settings.precision, head.weight0.dtype)
        got = head_deviation_loss(
            features.to(dtype),
            head.weight,
            head.bias,
            labels,
            head.weight0,
            penalty,
            weight_scale=head.weight_scale,
            backend=self.settings.backend,
        )
        return got.loss, got.correct

    def _update(self) -> None:
        if self.optimizer is not None and not self._head_only:
            self.optimizer.found_inf = self.guard.found_inf  # type: ignore[attr-defined]
            self.optimizer.step()
        if self._tunes_head or self.method.project:
            self.head.step(
                self._head_lr,
                self.settings.momentum,
                self.method.project,
                self.guard.found_inf,
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
