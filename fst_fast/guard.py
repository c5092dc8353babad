"""Keeps NaN and Inf out of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
        self.growth = torch.zeros((), dtype=torch.int32, device=device)
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
            torch._amp_update_scale_(self.scale, self.growth, self.found_inf, 2.0, 0.5, 2000)
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
        self._restore(step)
        return True

    def undo_forward(self) -> None:
        """Buffers as :meth:`before_step` found them."""
        self._restore(self._step)

    def _restore(self, step: int) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept[step % 2])


def _scale_and_check(tensors: list[Tensor], factor: Tensor, found: Tensor) -> None:
    """Multiply in place by a device scalar; set ``found`` to 1 where an element is not finite."""
    for dtype in {tensor.dtype for tensor in tensors}:
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        torch._amp_foreach_non_finite_check_and_unscale_(group, found, factor)
