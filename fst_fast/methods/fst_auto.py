"""Feature Shift Tuning held at a cosine instead of an alpha: ``method="fst_auto"``."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Batch, Closure, Method, Run


@dataclass(frozen=True)
class FSTAuto(Method):
    """FST (arXiv 2310.01875) with the cosine between W and W0 as its setting instead of alpha.

    Minimises ``mean cross-entropy + alpha * <W, W0>`` under ``||W|| = ||W0||``, with the penalty
    only while the cosine is above ``hold``: the head is turned so far, at whatever speed, and held
    there. A given alpha turns it further the more steps there are, the larger the learning rate
    and the smaller the pull of the data; the cosine that is reached says far more about what is
    left of a backdoor (docs/alpha.md). Three things make the turn cheaper:

    - the head has a higher learning rate, and in the first epochs it alone is trained, on features
      that stay;
    - four times as many epochs are run as asked for;
    - the weights are averaged over the last half of them, and the batch-norm statistics are then
      measured anew.

    Args:
        alpha: speed of the turn.
        hold: cosine in -1..1 at which it stops.
        head_epochs: share of the epochs in which the head alone is trained.
        head_lr: the head's learning rate, as a multiple of the others'.
        average: share of the epochs, at the end, over which weights are averaged.
    """

    name: ClassVar[str] = "fst_auto"
    reinitializes: ClassVar[bool] = True
    epochs_factor: ClassVar[int] = 4

    project: bool = True
    alpha: float = 0.1
    hold: float = -0.5
    head_epochs: float = 0.25
    head_lr: float = 5.0
    average: float = 0.5

    def __post_init__(self) -> None:
        for setting, least, most in (
            ("alpha", 0, math.inf),
            ("hold", -1, 1),
            ("head_epochs", 0, 1),
            ("head_lr", 0, math.inf),
            ("average", 0, 1),
        ):
            value = getattr(self, setting)
            if not (
                isinstance(value, int | float) and math.isfinite(value) and least <= value <= most
            ):
                bounds = f"in {least}..{most}" if math.isfinite(most) else f">= {least}"
                default = type(self).__dataclass_fields__[setting].default
                raise ValueError(
                    f"fst_auto: {setting} must be a number {bounds}, got {value!r}; the default is "
                    f"{default}"
                )

    @property
    def penalty(self) -> float:
        return self.alpha

    def begin(self, run: Run) -> None:
        run.head_lr = self.head_lr
        if self.average:
            run.average_weights(self.average)

    def head_epochs_of(self, epochs: int) -> int:
        """Return how many of a run's epochs train the head alone."""
        return round(self.head_epochs * epochs)

    def begin_epoch(self, run: Run, epoch: int) -> None:
        run.head_only_until = self.head_epochs_of(run.epochs)
        run.head_only = epoch < run.head_only_until

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        run.head.hold_at(self.hold)
        return closure(batch)
