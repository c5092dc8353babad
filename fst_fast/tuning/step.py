"""The device's work of one tuning step: loss, gradients, guard, update."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.batches import AUTOCAST
from ..heads.output import logits_of
from ..heads.tap import FeatureTap
from ..methods import Batch, Closure, HeadState, Method
from ..methods.probabilities import ENDINGS
from ..ops import head_deviation_loss
from .batch_source import Feed
from .distributed_model import SharedModel
from .nonfinite import Guard
from .run_state import RunState
from .settings import LoopSettings

# Heads of so many weights fall out of the caches: one pass fewer over them is a third of a step.
DEFERRED_FROM = 2**19


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether PyTorch could not allocate; on the CPU that has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


# Gradients of a method on a batch, as Method.gradients leaves them.
Gradients = Callable[[Batch, Closure], tuple[Tensor, Tensor]]


class Step:
    """One step of one method on one model, which is changed in place.

    Nothing in it waits for the device, and apart from ``head_only`` and ``parts`` it does the same
    work every time, so that it can be recorded as a CUDA graph.

    Args:
        state: gets all tensors of the step.
        gradients: the method's way to the gradients of a batch.
        after: what the method does behind the update.
        ending: the name in ENDINGS of what follows the head; the loss is of what comes before.
        shared: runs the model on this rank's rows in a data parallel run; else None.
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
        state: RunState,
        gradients: Gradients,
        after: Callable[[], None],
        ending: str | None = None,
        shared: SharedModel | None = None,
    ) -> None:
        self.model, self.method, self.shared = model, method, shared
        self._undo_ending = None if ending is None else ENDINGS[ending]
        self.compute, self.momentum = settings.compute, settings.momentum
        self._method_gradients, self._after = gradients, after
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
        device = self.compute.device
        self.lr = torch.tensor(settings.lr, device=device)
        self.head_lr = self.lr.clone()
        self.totals = torch.zeros(2, device=device, dtype=torch.float64)
        self.optimizer = self._make_optimizer() if self.backbone else None
        # A loss of the method's own asks for logits.
        self.tap = None if method.needs_logits else tap
        if self.tap is not None and method.project and self.head.weight.numel() >= DEFERRED_FROM:
            self.head.defer_scale()
        self._register(state)
        classes = len(self.head.weight0)
        agree = None if shared is None else shared.ranks.most_
        self.guard = Guard(state, device, self.compute.precision, classes, agree=agree)
        # These run the steps; what is computed but once is not worth compiling.
        self._run_model: Callable[[Tensor], object] = model
        self._run_tap = self.tap
        if self.compute.compile:
            self._run_model = torch.compile(model, dynamic=False)
            self._run_tap = None if self.tap is None else self.tap.compiled()

    def _register(self, state: RunState) -> None:
        kept = self.model.state_dict().keys()
        for name, parameter in self.model.named_parameters():
            state.add(f"model.{name}", parameter, "weight")
        for name, buffer in self.model.named_buffers():
            state.add(f"model.{name}", buffer, "buffer", saved=name in kept)
        head = self.head
        state.add("head.weight0", head.weight0, "fixed")
        state.add("head.norm0", head.norm0, "fixed")
        state.add("head.weight_momentum", head.weight_momentum, "momentum")
        if head.bias_momentum is not None:
            state.add("head.bias_momentum", head.bias_momentum, "momentum")
        if head.weight_scale is not None:
            # It is 1 whenever the head is whole, as it is between epochs.
            state.add("head.weight_scale", head.weight_scale, "weight", saved=False)
        if self.optimizer is not None and self.momentum:
            buffers = (self.optimizer.state[p]["momentum_buffer"] for p in self.backbone)
            state.add_all("momentum", buffers, "momentum")
        state.add("totals", self.totals, "count")

    def _make_optimizer(self) -> torch.optim.SGD:
        optimizer = torch.optim.SGD(self.backbone, lr=self.lr, momentum=self.momentum, fused=True)
        if self.momentum:
            for parameter in self.backbone:
                # It starts with zeros: a first step skipped by the guard then leaves no garbage.
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def place(self, images: Tensor) -> Tensor:
        """The images on the device, in the weights' dtype and layout."""
        compute, dtype = self.compute, self.head.weight0.dtype
        return images.to(compute.device, dtype, non_blocking=True, memory_format=compute.layout)

    def features(self, images: Tensor) -> Tensor | None:
        """The head's input for placed images, or None where the model does more than its head."""
        if self.tap is None:
            return None
        with self.compute.autocast():
            return self.on_rows(self.model, self.tap, images)

    def on_rows(
        self,
        model: nn.Module,
        forward: Callable[..., Tensor | None],
        inputs: Tensor,
        *tensors: Tensor,
    ) -> Tensor | None:
        """Return ``forward(inputs, *tensors)``, whose rows the ranks share if there are any."""
        if self.shared is None:
            return forward(inputs, *tensors)
        return self.shared(model, forward, inputs, *tensors)

    def __call__(self, feed: Feed, kind: Hashable) -> None:
        """Take the staged batch and step; adds to ``totals``."""
        inputs, labels = feed.take(kind)
        labels = self.guard.admit(inputs, labels)
        batch = Batch(inputs, labels, feed.gives_features)
        loss, correct = self._method_gradients(batch, self._gradients)
        trained = self._head_parameters + ([] if self.head_only else self.backbone)
        self.guard.inspect(loss, [p.grad for p in trained if p.grad is not None])
        self._update()
        self._after()
        self.totals[0] += loss * len(labels)
        self.totals[1] += correct
        feed.advance(kind)

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Leave the batch's gradients; returns its mean loss and number correct."""
        self.model.zero_grad(set_to_none=True)
        count = len(batch.labels)
        size = -(-count // self.parts)
        losses, corrects = [], []
        for inputs, labels in zip(batch.inputs.split(size), batch.labels.split(size), strict=True):
            loss, correct = self._loss(Batch(inputs, labels, batch.are_features))
            if self.parts > 1:
                # The parts add up to the mean over the batch, and their penalties to one penalty.
                loss = loss * (len(labels) / count)
            (loss * self.guard.scale).backward()
            losses.append(loss.detach())
            corrects.append(correct)
        if self.parts == 1:
            return losses[0], corrects[0]
        return torch.stack(losses).sum(), torch.stack(corrects).sum()

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and the number correct, from features where the model allows it."""
        found = self._loss_of_features(batch)
        if found is not None:
            return found
        logits = self.on_rows(self.model, self._logits_of, batch.inputs)
        assert logits is not None
        loss = self.method.loss(logits, batch.labels, self.head)
        return loss, (logits.argmax(1) == batch.labels).sum()

    def _loss_of_features(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """The fused loss, where the head has the last word; each rank's is that of its rows."""
        if not batch.are_features and self._run_tap is None:
            return None
        shared, count = self.shared, len(batch.labels)
        rows = None if shared is None else shared.ranks.rows(count)
        if shared is None or rows is None:
            found = self._tapped(batch)
        else:
            part = Batch(batch.inputs[rows], batch.labels[rows], batch.are_features)
            with shared.sharing(self.model):
                found = self._tapped(part)
        if found is None:
            self._untap()
            return None
        if shared is None or rows is None:
            return found
        loss, correct = found
        # The ranks' losses add up to the mean over the batch, and their penalties to one penalty.
        return shared.total(loss * (len(part.labels) / count), correct)

    def _tapped(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        if batch.are_features:
            return self._fused_loss(batch.inputs, batch.labels)
        assert self._run_tap is not None
        with self.compute.autocast():
            features = self._run_tap(batch.inputs)
        return None if features is None else self._fused_loss(features, batch.labels)

    def _untap(self) -> None:
        """In train mode the model does more than its head, after all."""
        self.tap = self._run_tap = None
        self.head.materialize()
        self.head.weight_scale = None
        self.guard.undo_forward()

    def _logits_of(self, images: Tensor) -> Tensor:
        with self.compute.autocast():
            output = self._run_model(images)
        return self.logits(output)

    def logits(self, output: object) -> Tensor:
        """Return the logits [B, K] of what the model returned, in float32 at least."""
        logits = logits_of(output).flatten(1)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return logits if self._undo_ending is None else self._undo_ending(logits)

    def _fused_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        head = self.head
        penalty: float | Tensor = self.method.penalty
        if head.pressure is not None:
            penalty = head.pressure * penalty
        # Layers that autocast keeps in float32 may come last; the head's product is not one.
        dtype = AUTOCAST.get(self.compute.precision, head.weight0.dtype)
        got = head_deviation_loss(
            features.to(dtype),
            head.weight,
            head.bias,
            labels,
            head.weight0,
            penalty,
            weight_scale=head.weight_scale,
            backend=self.compute.backend,
        )
        return got.loss, got.correct

    def _update(self) -> None:
        if self.optimizer is not None and not self.head_only:
            self.optimizer.found_inf = self.guard.found_inf  # type: ignore[attr-defined]
            self.optimizer.step()
        if self.tunes_head or self.method.project:
            self.head.step(
                self.head_lr,
                self.momentum,
                self.method.project,
                self.guard.found_inf,
                self.compute.backend,
            )

    def make_room(self, feed: Feed, kind: Hashable, error: Exception) -> None:
        """After a step that ran out of memory: split the batch further.

        Raises:
            RuntimeError: the parts would not give the gradients of the whole; it tells the size
                of a batch that fits.
        """
        self.model.zero_grad(set_to_none=True)
        inputs, labels = feed.take(kind)
        if self.shared is not None:
            raise RuntimeError(
                f"purify: a batch of {len(labels)} over {self.shared.ranks.size} ranks takes more "
                f"memory than there is on {self.compute.device}; use a smaller batch, or more ranks"
            ) from error
        averages = any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules())
        count = len(labels)
        if not averages and not self.method.needs_logits and self.parts < count:
            self.parts *= 2
            return
        size = count // 2
        # Batch norm may need two.
        while size > 1 and not self._fits(Batch(inputs[:size], labels[:size], feed.gives_features)):
            size //= 2
        why = "batch norm averages over all of it" if averages else "its loss is one of the whole"
        if size <= 1:
            why, remedy = "nothing smaller fits", "use a machine with more memory"
        else:
            remedy = f"a batch of {size} fits: give the loader batch_size={size}"
        raise RuntimeError(
            f"purify: a batch of {count} takes more memory than there is on "
            f"{self.compute.device}, and cannot be split, as {why}; {remedy}"
        ) from error

    def _fits(self, batch: Batch) -> bool:
        try:
            self._method_gradients(batch, self._gradients)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self.model.zero_grad(set_to_none=True)
            self.guard.undo_forward()
        return True
