"""A copy of the suspect that a method tunes beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Run

_MOMENTUM = 0.9


class TunedCopy:
    """A copy of the suspect in train mode, which is tuned by SGD with momentum 0.9.

    Args:
        run: the copy and its momentum are registered there.
        name: under which they are.
        lr: learning rate.
    Attributes:
        model: the copy.
        weights: its parameters.
    """

    def __init__(self, run: Run, name: str, lr: float) -> None:
        self._lr = lr
        self.model = copy.deepcopy(run.model).train().requires_grad_()
        self.weights: list[Tensor] = list(self.model.parameters())
        self._velocity = [torch.zeros_like(weight) for weight in self.weights]
        for part, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            run.register(f"{name}.{part}", tensor)
        for number, tensor in enumerate(self._velocity):
            run.register(f"{name}.velocity.{number}", tensor)

    @torch.no_grad()
    def descend(self, gradients: Sequence[Tensor]) -> None:
        """Make one step against the gradients of the weights."""
        torch._foreach_mul_(self._velocity, _MOMENTUM)
        torch._foreach_add_(self._velocity, [*gradients])
        torch._foreach_add_(self.weights, self._velocity, alpha=-self._lr)
