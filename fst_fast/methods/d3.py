"""Distance-Driven Detoxification (D3; Wei et al., ICCV 2025, arXiv 2411.09585)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import HeadState, Method, Run
from .checks import check_numbers


@dataclass(frozen=True)
class D3(Method):
    """Re-initialise the head and drive it away from the compromised weight, as far as it goes.

    Minimises ``fit * mean relu(cross-entropy of an image - slack) - ||W - W0||_F`` under
    ``||W|| = ||W0||``, divided by ``fit + 1`` where ``fit > 1``. Images that are fitted as well as
    ``slack`` asks have no gradient, so that nothing but the distance counts there.

    The defaults are those of the authors' code. They run 100 epochs with batches of 256 on 2,500
    images of CIFAR-10 (lr 0.01, momentum 0.9, no weight decay, cosine schedule): give ``epochs``
    accordingly. The new bias is drawn as ``nn.Linear`` does, which is our choice.

    Args:
        fit: weight of the hinged cross-entropy.
        slack: cross-entropy of an image from which on it counts.

    Example:
        >>> fst_fast.methods.get("d3", fit=2.0)
        D3(project=True, fit=2.0, slack=0.1)
    """

    name: ClassVar[str] = "d3"
    reinitializes: ClassVar[bool] = True

    project: bool = True
    fit: float = 0.5
    slack: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(self, fit=(0, math.inf), slack=(0, math.inf))

    def loss(self, logits: Tensor, labels: Tensor, head: HeadState) -> Tensor:
        hinged = (F.cross_entropy(logits, labels, reduction="none") - self.slack).relu().mean()
        loss = self.fit * hinged - (head.weight - head.weight0).norm()
        return loss / (self.fit + 1) if self.fit > 1 else loss

    def begin(self, run: Run) -> None:
        # The new weight has the original norm from the first step on.
        with torch.no_grad():
            run.head.weight.mul_(run.head.norm0 / run.head.weight.norm())
