"""Masks on the channels of a model's batch norms, which are learnt and then prune."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .accuracy_limit import largest_allowed
from .base import Run

# Channels with a mask below such a value are pruned together.
THRESHOLDS = tuple(step / 20 for step in range(1, 20))


class ChannelMasks:
    """One mask in 0..1 for each channel, which multiplies the batch norm's weight.

    All channels of all layers lie in one vector, so that a step takes few launches.

    Args:
        norms: batch norms of one model; their weights are changed in place.
    Attributes:
        mask: [channels of all norms], 1 at the start.
        velocity: of the masks' descent, the same shape.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self._weights: list[Tensor] = [norm.weight for norm in norms]
        self._biases: list[Tensor] = [norm.bias for norm in norms]
        self._sizes = [len(weight) for weight in self._weights]
        self._weight0, self._bias0 = _flat(self._weights), _flat(self._biases)
        self.mask = torch.ones_like(self._weight0)
        self.velocity = torch.zeros_like(self._weight0)

    def register(self, run: Run) -> None:
        """Let a resumed run go on from these masks."""
        run.register("masks", self.mask)
        run.register("masks.velocity", self.velocity)
        run.register("masks.weights", self._weight0)
        run.register("masks.biases", self._bias0)

    def look_again(self) -> None:
        """Take the weights and biases as they are now for the original ones."""
        self._weight0.copy_(_flat(self._weights))
        self._bias0.copy_(_flat(self._biases))

    @torch.no_grad()
    def put(self, weights: Tensor, biases: Tensor | None = None) -> None:
        """Give every channel its original weight times a factor, and its bias; None is 1."""
        scaled = (self._weight0 * weights).split(self._sizes)
        torch._foreach_copy_(self._weights, [*scaled])
        shifted = self._bias0 if biases is None else self._bias0 * biases
        torch._foreach_copy_(self._biases, [*shifted.split(self._sizes)])

    def put_back(self) -> None:
        """Give every channel its original weight and bias."""
        self.put(torch.ones_like(self.mask))

    def gradients(self, loss_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of the factors in :meth:`put`, from the gradients in the parameters.

        What a loss scale has made overflow is 0.
        """
        kinds = ((self._weights, self._weight0), (self._biases, self._bias0))
        found = (_flat([p.grad for p in ps if p.grad is not None]) * v for ps, v in kinds)
        weights, biases = (torch.nan_to_num(g / loss_scale, 0.0, 0.0, 0.0) for g in found)
        return weights, biases

    @torch.no_grad()
    def descend(self, gradient: Tensor, lr: float, momentum: float = 0.9) -> None:
        """Make one step of the masks by SGD, which end in 0..1."""
        self.velocity.mul_(momentum).add_(gradient)
        self.mask.sub_(lr * self.velocity).clamp_(0, 1)

    def prune(self, run: Run, most_lost: float) -> None:
        """Set the weights of channels with small masks to zero, in as many as the accuracy allows.

        The threshold rises by steps of 0.05 for as long as the accuracy on clean images is not
        more than ``most_lost`` below that of the whole model. No attack is asked for.
        """
        self.put_back()
        whole = torch.ones_like(self.mask)
        largest_allowed(run, whole, self._ever_fewer(whole), self.put, most_lost)

    def _ever_fewer(self, whole: Tensor) -> Iterator[Tensor]:
        """The channels that each threshold leaves, where they are others than those before."""
        former = whole
        for threshold in THRESHOLDS:
            fewer = (self.mask >= threshold).to(whole.dtype)
            if not torch.equal(fewer, former):
                yield fewer
            former = fewer


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach() for tensor in tensors])
