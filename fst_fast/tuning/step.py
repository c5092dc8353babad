"""The device's work of one tuning step: loss, gradients, guard, update."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.batches import AUTOCAST, autocast
from ..heads.find import logits_of
from ..heads.tap import FeatureTap
from ..methods import HeadState, Method
from ..ops import head_deviation_loss
from .batch_source import Feed
from .memory import is_out_of_memory
from .nonfinite import Guard

# Heads of so many weights fall out of the caches: one pass fewer over them is a third of a step.
DEFERRED_FROM = 2**19


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
    compile: bool = False


class Step:
    """One step of one method on one model, which is changed in place.

    Nothing in it waits for the device, and apart from ``head_only`` and ``parts`` it does the same
    work every time, so that it can be recorded as a CUDA graph.

    Attributes:
        head_only: train the head alone, as some methods do in their first epochs.
        parts: into how many parts a batch is split, to take less memory.
        lr, head_lr: 0-d, of the backbone and the head.
        totals: [2] float64, summed loss and number correct since they were last set to zero.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        method: Method,
        settings: LoopSettings,
        tap: FeatureTap | None,
    ) -> None:
        self.model, self.method, self.settings = model, method, settings
        self.head = HeadState(head)
        self.tunes_head = method.trains != "backbone"
        own = {id(p) for p in head.parameters()}
        tunes_backbone = method.trains != "head"
        for parameter in model.parameters():
            wanted = self.tunes_head if id(parameter) in own else tunes_backbone
            parameter.requires_grad_(wanted)
        everything = list(model.parameters())
        self.backbone = [p for p in everything if id(p) not in own] if tunes_backbone else []
        self._head_parameters = list(head.parameters()) if self.tunes_head else []
        self.head_only = False
        self.parts = 1
        self.lr = torch.tensor(settings.lr, device=settings.device)
        self.head_lr = self.lr.clone()
        self.totals = torch.zeros(2, device=settings.device, dtype=torch.float64)
        self.optimizer = self._make_optimizer() if self.backbone else None
        classes = len(self.head.weight0)
        self.guard = Guard(model, settings.device, settings.precision, classes)
        # A method's own loss asks for logits.
        self.tap = tap if type(method).loss is Method.loss else None
        if self.tap is not None and method.project and self.head.weight.numel() >= DEFERRED_FROM:
            self.head.defer_scale()
        # Those of the steps; what is computed but once is not worth compiling.
        self._run_model: Callable[[Tensor], object] = model
        self._run_tap = self.tap
        if settings.compile:
            self._run_model = torch.compile(model, dynamic=False)
            self._run_tap = None if self.tap is None else self.tap.compiled()

    def _make_optimizer(self) -> torch.optim.SGD:
        optimizer = torch.optim.SGD(
            self.backbone, lr=self.lr, momentum=self.settings.momentum, fused=True
        )
        if self.settings.momentum:
            for parameter in self.backbone:
                # Zeros from the start: a first step skipped by the guard then leaves no garbage.
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def state(self) -> list[Tensor]:
        """All tensors that a step changes."""
        head = self.head
        out = [*self.model.parameters(), *self.model.buffers(), self.totals, *self.guard.state()]
        out += [t for t in (head.weight_momentum, head.bias_momentum) if t is not None]
        if head.weight_scale is not None:
            out.append(head.weight_scale)
        if self.optimizer is not None and self.settings.momentum:
            out += [self.optimizer.state[p]["momentum_buffer"] for p in self.backbone]
        return out

    def place(self, images: Tensor) -> Tensor:
        """The images on the device, in the weights' dtype and layout."""
        settings = self.settings
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        dtype = self.head.weight0.dtype
        return images.to(settings.device, dtype, non_blocking=True, memory_format=layout)

    def features(self, images: Tensor) -> Tensor | None:
        """The head's input for placed images, or None where the model does more than its head."""
        if self.tap is None:
            return None
        with autocast(self.settings.device, self.settings.precision):
            return self.tap(images)

    def __call__(self, feed: Feed, kind: Hashable) -> None:
        """Take the staged batch and step; adds to ``totals``."""
        inputs, labels = feed.take(kind)
        labels = self.guard.admit(inputs, labels)
        self.model.zero_grad(set_to_none=True)
        loss, correct = self._gradients(inputs, labels, feed.gives_features)
        trained = self._head_parameters + ([] if self.head_only else self.backbone)
        self.guard.inspect(loss, [p.grad for p in trained if p.grad is not None])
        self._update()
        self.totals[0] += loss * len(labels)
        self.totals[1] += correct
        feed.advance(kind)

    def _gradients(
        self, inputs: Tensor, labels: Tensor, are_features: bool
    ) -> tuple[Tensor, Tensor]:
        """Leave the batch's gradients; returns its mean loss and number correct."""
        hold = self.method.course.hold
        if hold is not None:
            self.head.hold_at(hold)
        count = len(labels)
        size = -(-count // self.parts)
        losses, corrects = [], []
        for part, named in zip(inputs.split(size), labels.split(size), strict=True):
            loss, correct = self._loss(part, named, are_features)
            if self.parts > 1:
                # The mean over the batch; the penalty, in each part, adds up to one as well.
                loss = loss * (len(named) / count)
            (loss * self.guard.scale).backward()
            losses.append(loss.detach())
            corrects.append(correct)
        if self.parts == 1:
            return losses[0], corrects[0]
        return torch.stack(losses).sum(), torch.stack(corrects).sum()

    def _loss(self, inputs: Tensor, labels: Tensor, are_features: bool) -> tuple[Tensor, Tensor]:
        """The loss and the number correct, from features where the model allows it."""
        head = self.head
        if are_features:
            return self._fused_loss(inputs, labels)
        if self._run_tap is not None:
            with autocast(self.settings.device, self.settings.precision):
                features = self._run_tap(inputs)
            if features is not None:
                return self._fused_loss(features, labels)
            # In train mode the model does more than its head, after all.
            self.tap = self._run_tap = None
            head.materialize()
            head.weight_scale = None
            self.guard.undo_forward()
        with autocast(self.settings.device, self.settings.precision):
            logits = logits_of(self._run_model(inputs)).flatten(1)
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
        if self.optimizer is not None and not self.head_only:
            self.optimizer.found_inf = self.guard.found_inf  # type: ignore[attr-defined]
            self.optimizer.step()
        if self.tunes_head or self.method.project:
            self.head.step(
                self.head_lr,
                self.settings.momentum,
                self.method.project,
                self.guard.found_inf,
                self.settings.backend,
            )

    def make_room(self, feed: Feed, kind: Hashable, error: Exception) -> None:
        """After a step that ran out of memory: split the batch further.

        Raises:
            RuntimeError: the parts would not give the gradients of the whole; it tells the size
                of a batch that fits.
        """
        self.model.zero_grad(set_to_none=True)
        inputs, labels = feed.take(kind)
        averages = any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules())
        count = len(labels)
        if not averages and type(self.method).loss is Method.loss and self.parts < count:
            self.parts *= 2
            return
        size = count // 2
        # Batch norm may need two.
        while size > 1 and not self._fits(inputs[:size], labels[:size], feed.gives_features):
            size //= 2
        why = "batch norm averages over all of it" if averages else "its loss is one of the whole"
        if size <= 1:
            why, remedy = "nothing smaller fits", "use a machine with more memory"
        else:
            remedy = f"a batch of {size} fits: give the loader batch_size={size}"
        raise RuntimeError(
            f"purify: a batch of {count} takes more memory than there is on "
            f"{self.settings.device}, and cannot be split, as {why}; {remedy}"
        ) from error

    def _fits(self, inputs: Tensor, labels: Tensor, are_features: bool) -> bool:
        try:
            self._gradients(inputs, labels, are_features)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self.model.zero_grad(set_to_none=True)
            self.guard.undo_forward()
        return True
