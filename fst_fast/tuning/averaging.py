"""The mean of a model's weights over the last epochs, and batch-norm statistics to go with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .run_state import RunState


class WeightAverage:
    """Averages the parameters of a model (Izmailov et al., UAI 2018, arXiv 1803.05407).

    Args:
        share: of the epochs, at the end, whose weights count; in 0..1, one epoch at least.
        epochs: of the run.
        state: gets the mean and the count.
    Attributes:
        first: the first epoch that counts, from 0.
        mean: of the weights that were counted, in the order of the parameters.
        count: how often that was, on the CPU.
    """

    def __init__(self, model: nn.Module, share: float, epochs: int, state: RunState) -> None:
        self.first = min(epochs - 1, math.floor(epochs * (1 - share)))
        self._parameters: list[Tensor] = list(model.parameters())
        self.mean = [torch.zeros_like(parameter) for parameter in self._parameters]
        self.count = torch.zeros((), dtype=torch.int64)
        state.add_all("average", self.mean, "average")
        state.add("average.count", self.count, "average")

    @torch.no_grad()
    def add(self) -> None:
        """Count the weights as they are."""
        self.count += 1
        torch._foreach_lerp_(self.mean, self._parameters, 1 / int(self.count))

    @torch.no_grad()
    def put_in(self) -> None:
        """Make the mean the model's weights."""
        torch._foreach_copy_(self._parameters, self.mean)


@contextmanager
def fresh_statistics(model: nn.Module) -> Iterator[Callable[[int], None] | None]:
    """Batch norm forgets its statistics and averages over what is run within, in train mode.

    Yields what is to be called with 1, 2, ... before each batch, or None where there is nothing to
    be measured.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = {layer: layer.momentum for layer in layers}
    modes = {module: module.training for module in model.modules()}

    def weigh(count: int) -> None:
        # This equals momentum=None, which would wait for the device to tell the count.
        for layer in layers:
            layer.momentum = 1 / count

    # Batch norm alone is in train mode: dropout would disturb what is measured.
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    try:
        yield weigh if layers else None
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training
