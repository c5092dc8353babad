"""Keeps NaN, Inf and labels that are no class out of the weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .run_state import RunState

# The host may be so many steps ahead of a GPU: it is kept busy, and still stops soon.
# A CUDA graph holds at most half as many (cuda_graphs.MOST_STEPS): one waits while another runs.
RUN_AHEAD = 32


@dataclass(frozen=True)
class Fault:
    """The first thing that went wrong: steps before it, and whether the batch was to blame."""

    good_steps: int
    bad_images: bool
    bad_labels: bool

    def told(self, where: str, classes: int) -> str:
        """Return the words that tell the user of it.

        Raises:
            ValueError: a batch was bad, which is the caller's to mend.
        """
        if not self.bad_images and not self.bad_labels:
            return (
                f"the loss or a gradient was not finite at {where}; the weights are those from "
                "before that step; try a lower lr, a lower alpha or precision='fp32'"
            )
        expected, got, remedy = (
            (f"labels in 0..{classes - 1}", "another", "check the label mapping")
            if self.bad_labels
            else ("finite images", "NaN or Inf", "check the files and the normalisation")
        )
        raise ValueError(
            f"purify: loader must yield {expected}, got {got} at {where}; the model was left as "
            f"before that step; {remedy}"
        )


class Guard:
    """Freezes a run, on the device, at the first step that is not finite.

    ``found_inf`` goes to the optimizer and to ``head_step_``, which leave everything as it is
    where it is not zero. It stays set after a loss, gradient or buffer that is not finite, or a
    label that is no class: whatever is queued behind that step changes no weight, and
    :meth:`finish` puts the buffers (batch-norm statistics) back to before it. With a loss scale
    (fp16), an overflow of the gradients alone skips one step and lowers the scale.

    All of a step happens on the device, so it can be captured in a CUDA graph, alone or with
    others. The host reads the flag of some steps ago, which also keeps it from running further
    ahead than that.

    Args:
        state: holds the model's buffers, which are kept, and gets the guard's own tensors.
        device: where it is.
        precision: "fp16" scales the loss.
        classes: labels must lie in 0..classes-1.
        lag: how many steps ago that is; None is RUN_AHEAD on a GPU and 0 elsewhere.
        agree: replaces flags by their greatest value over the ranks of a data parallel run.
    Attributes:
        good_steps: 0-d int64, how many there were before the first that went wrong.
    """

    def __init__(
        self,
        state: RunState,
        device: torch.device,
        precision: str,
        classes: int,
        lag: int | None = None,
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._agree = agree
        self.scales = precision == "fp16"
        self.scale = torch.full((), 2.0**16 if self.scales else 1.0, device=device)
        self.found_inf = torch.zeros((), device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)
        self._classes = classes
        self._fatal = torch.zeros((), device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._bad = torch.zeros(2, dtype=torch.bool, device=device)  # [images, labels]
        self._one = torch.ones((), device=device)
        buffers = [b for b in state.tensors("buffer") if b.numel()]
        self._statistics = [b for b in buffers if b.is_floating_point()]
        # Each dtype has one flat copy: two launches a step, however many layers there are.
        self._kept = []
        for dtype in dict.fromkeys(b.dtype for b in buffers):
            group = [b for b in buffers if b.dtype == dtype]
            self._kept.append((group, _flat(group)))
        pinned = device.type == "cuda"
        self._lag = (RUN_AHEAD if pinned else 0) if lag is None else lag
        self._seen = torch.zeros(self._lag + 1, pin_memory=pinned)
        self._events = [torch.cuda.Event() if pinned else None for _ in range(self._lag + 1)]
        # It holds the slots of flags that the host has not seen, and the steps that each is behind.
        self._queued: deque[tuple[int, int]] = deque()
        self._ahead = 0
        self._next, self._last = 0, -1
        self._register(state)

    def _register(self, state: RunState) -> None:
        """Return the tensors that :meth:`inspect` changes; between epochs no flag is set."""
        state.add("guard.scale", self.scale, "other")
        state.add("guard.growth", self.growth, "other")
        state.add("guard.found_inf", self.found_inf, "flag", saved=False)
        state.add("guard.fatal", self._fatal, "flag", saved=False)
        state.add("guard.bad", self._bad, "flag", saved=False)
        state.add("guard.good_steps", self.good_steps, "count", saved=False)
        for number, (_, kept) in enumerate(self._kept):
            state.add(f"guard.kept.{number}", kept, "other", saved=False)

    def admit(self, images: Tensor, labels: Tensor) -> Tensor:
        """Look at a batch before it is used; returns labels that are all classes."""
        darkest, brightest = images.aminmax()  # NaN where there is one
        low, high = labels.aminmax()
        finite = darkest.isfinite() & brightest.isfinite()
        bad = ~torch.stack([finite, (low >= 0) & (high < self._classes)])
        # The first fault is the one to tell.
        self._bad |= bad & (self._fatal == 0)
        return labels.clamp(0, self._classes - 1)

    def inspect(self, loss: Tensor, grads: list[Tensor]) -> None:
        """Unscale the gradients in place and set ``found_inf``."""
        self._fatal += loss.isfinite().logical_not() + self._bad[1]
        _scale_and_check(self._statistics, self._one, self._fatal)
        self.found_inf.zero_()
        _scale_and_check(grads, self.scale.reciprocal(), self.found_inf)
        if self._agree is not None:
            flags = self._agree(torch.stack([self._fatal, self.found_inf]))
            self._fatal.copy_(flags[0])
            self.found_inf.copy_(flags[1])
        if not self.scales:
            self._fatal += self.found_inf
        # The fused optimizers compare with 1 exactly.
        self._fatal.clamp_(max=1)
        if self.scales:
            torch._amp_update_scale_(self.scale, self.growth, self.found_inf, 2.0, 0.5, 2000)
        torch.maximum(self.found_inf, self._fatal, out=self.found_inf)
        self.good_steps += self._fatal == 0
        self.keep()

    def keep(self) -> None:
        """Take the buffers as they are for good ones, unless something has gone wrong."""
        for group, kept in self._kept:
            torch.where(self._fatal == 0, _flat(group), kept, out=kept)

    def after_step(self, steps: int = 1) -> bool:
        """Queue the flag for the host, behind so many steps since the last one.

        Returns:
            Whether a step that is done had gone wrong.
        """
        slot = self._last = self._next
        self._next = (slot + 1) % len(self._events)
        self._seen[slot].copy_(self._fatal, non_blocking=True)
        event = self._events[slot]
        if event is not None:
            event.record()
        self._queued.append((slot, steps))
        self._ahead += steps
        failed = False
        while self._ahead > self._lag:
            oldest, behind = self._queued.popleft()
            self._ahead -= behind
            failed = self._failed(oldest)
        return failed

    def finish(self) -> Fault | None:
        """Wait for all steps; what went wrong, with the buffers put back to before it."""
        if self._last < 0 or not self._failed(self._last):
            return None
        self.undo_forward()
        images, labels = self._bad.tolist()
        return Fault(int(self.good_steps), images, labels)

    def _failed(self, slot: int) -> bool:
        event = self._events[slot]
        if event is not None:
            event.synchronize()
        return self._seen[slot].item() != 0

    def undo_forward(self) -> None:
        """Buffers as the last good step left them."""
        for group, kept in self._kept:
            parts = kept.split([b.numel() for b in group])
            for buffer, part in zip(group, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _scale_and_check(tensors: list[Tensor], factor: Tensor, found: Tensor) -> None:
    """Multiply in place by a device scalar; set ``found`` to 1 where an element is not finite."""
    for dtype in {tensor.dtype for tensor in tensors}:
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        torch._amp_foreach_non_finite_check_and_unscale_(group, found, factor)
