"""Path-Aware Minimization (PAM; Min et al., NeurIPS 2024, arXiv 2410.09838)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Batch, Closure, Method, Run
from .checks import check_numbers
from .kept import KeptTensors
from .trigger_unlearning import TriggerUnlearning


@dataclass(frozen=True)
class PAM(Method):
    """Tune every parameter with the gradient at weights on the way back to the suspect's.

    The step at the weights ``w`` takes the gradient of the cross-entropy at
    ``w + rho * d / ||d||``, where ``d`` is the suspect's weights minus ``w``: what is learnt then
    holds on the path back as well, along which a purified model would be attacked anew.

    The authors also show images with triggers that BTI-DBF inverts, with their true labels, in
    about a tenth of each batch. Here ``inverted`` is the share of a batch that carries triggers
    found by the search of :class:`~fst_fast.methods.trigger_unlearning.TriggerUnlearning` instead,
    which is our choice; without it a step costs as much as plain tuning. The authors use lr 0.01,
    momentum 0.1 and three rounds of 30 epochs: give ``momentum`` and ``epochs`` accordingly.

    Args:
        rho: length of the way back; 0 is plain tuning. The authors try 0.3 to 0.9.
        inverted: share of each batch that carries searched triggers.

    Example:
        >>> fst_fast.methods.get("pam", rho=0.9)
        PAM(project=False, rho=0.9, inverted=0.0)
    """

    name: ClassVar[str] = "pam"

    rho: float = 0.5
    inverted: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, rho=(0, math.inf), inverted=(0, 1))

    @property
    def _search(self) -> Method:
        """The method that shows triggers, or one that shows none."""
        return TriggerUnlearning(found=self.inverted) if self.inverted else Method()

    def begin(self, run: Run) -> None:
        run.memo["weights"] = KeptTensors(run.model.parameters())
        run.memo["suspect"] = [p.detach().clone() for p in run.model.parameters()]
        self._search.begin(run)

    def begin_epoch(self, run: Run, epoch: int) -> None:
        self._search.begin_epoch(run, epoch)

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        def on_the_way_back(batch: Batch) -> tuple[Tensor, Tensor]:
            with run.memo["weights"].unchanged():
                move_towards(list(run.model.parameters()), run.memo["suspect"], self.rho)
                return closure(batch)

        # A factor that the projection keeps apart would make another way.
        run.head.materialize()
        return self._search.gradients(run, batch, on_the_way_back)

    def finish(self, run: Run) -> None:
        self._search.finish(run)


@torch.no_grad()
def move_towards(weights: list[Tensor], goal: list[Tensor], length: float) -> None:
    """Move the weights by ``length`` towards the goal, over it too; nowhere if they are there."""
    way = torch._foreach_sub(goal, weights)
    distance = torch.stack(torch._foreach_norm(way)).norm()
    torch._foreach_mul_(way, length / distance.clamp(min=1e-12))
    torch._foreach_add_(weights, way)
