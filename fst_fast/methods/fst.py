"""Feature Shift Tuning (Min et al., NeurIPS 2023, arXiv 2310.01875)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from .base import Method


@dataclass(frozen=True)
class FST(Method):
    """Re-initialise the head, push it away from the compromised weight, tune everything.

    Minimises ``mean cross-entropy + alpha * <W, W0>`` under ``||W|| = ||W0||``.

    Args:
        alpha: weight of the inner product. It is not normalised, so its effect grows with ||W0||,
            the learning rate and the number of steps. The paper uses 0.2 for CIFAR-10, 0.1 for
            GTSRB and 0.001 for CIFAR-100 and Tiny ImageNet.
    """

    name: ClassVar[str] = "fst"
    reinitializes: ClassVar[bool] = True

    project: bool = True
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"fst: alpha must be a finite number >= 0, got {self.alpha}")

    @property
    def penalty(self) -> float:
        return self.alpha
