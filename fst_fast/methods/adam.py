"""Adam for the tensors that a method searches, all of whose state is registered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Run

_MEAN, _SQUARE, _EPS = 0.9, 0.999, 1e-8


class Adam:
    """Adam (Kingma and Ba, ICLR 2015, arXiv 1412.6980) whose count lies on the device.

    Args:
        tensors: changed in place.
        lr: learning rate.
    """

    def __init__(self, tensors: Sequence[Tensor], lr: float) -> None:
        self._tensors, self._lr = list(tensors), lr
        self._means = [torch.zeros_like(tensor) for tensor in tensors]
        self._squares = [torch.zeros_like(tensor) for tensor in tensors]
        self._count = torch.zeros((), dtype=torch.float64, device=tensors[0].device)

    def register(self, run: Run, name: str) -> None:
        """Let a resumed run go on from here; the tensors are part of that."""
        for number, tensor in enumerate([*self._tensors, *self._means, *self._squares]):
            run.register(f"{name}.{number}", tensor)
        run.register(f"{name}.count", self._count)

    def reset(self) -> None:
        """Forget all steps; the tensors stay."""
        for tensor in [*self._means, *self._squares, self._count]:
            tensor.zero_()

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take a step against the gradients."""
        self._count += 1
        slopes = list(gradients)
        torch._foreach_lerp_(self._means, slopes, 1 - _MEAN)
        torch._foreach_mul_(self._squares, _SQUARE)
        torch._foreach_addcmul_(self._squares, slopes, slopes, 1 - _SQUARE)
        spread = torch._foreach_sqrt(self._squares)
        torch._foreach_mul_(spread, (1 - _SQUARE**self._count).rsqrt())
        torch._foreach_add_(spread, _EPS)
        moves = torch._foreach_div(self._means, spread)
        torch._foreach_mul_(moves, -self._lr / (1 - _MEAN**self._count))
        torch._foreach_add_(self._tensors, [*moves])
