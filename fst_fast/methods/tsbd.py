"""Two-Stage Backdoor Defense (TSBD; Lin et al., NeurIPS 2024, arXiv 2405.20291)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .accuracy_limit import largest_allowed
from .ascent import Ascent
from .base import Batch, Closure, Method, Run
from .checks import check_counts, check_numbers
from .kept import KeptTensors
from .norms import INSTEAD

# Such shares of all filters are tried, the smallest first.
SHARES = tuple(step / 20 for step in range(1, 20))


@dataclass(frozen=True)
class TSBD(Method):
    """Set back the weights that move most when clean images are unlearnt, then tune smoothly.

    First a copy of the suspect ascends the cross-entropy of clean images until at most
    ``forgotten`` of them are answered rightly. The change of a convolution's filter is the sum of
    its weights' absolute changes: filters that serve the backdoor change most. Of every filter
    among those that changed most in the whole model, the share ``zeroed`` of weights that changed
    most becomes zero in the suspect.

    Then every parameter is tuned. With ``g`` the gradient at the weights ``w``, a step takes
    ``(1 - smooth) * g(w) + smooth * g(w + rho * g / ||g||)``, where each tensor has its own norm.
    Batch norm's statistics, the loss and the accuracy are those of the first pass.

    The defaults are those of the authors' code, which tunes for 20 epochs: give ``epochs``
    accordingly. How many filters are set back, they sweep with the attack. Here it is the largest
    share, in steps of 0.05, that costs at most ``most_lost`` of the accuracy on clean images before
    they are tuned: those of ``validation``, else those of the loader. Our choices as well: the
    unlearning draws its batches, has momentum and ends after ``passes``; ``zeroed`` counts in each
    filter on its own.

    Args:
        images: clean images that are unlearnt.
        unlearn_lr: learning rate of the ascent.
        forgotten: accuracy in 0..1 at which the ascent ends.
        passes: most passes of the ascent over the images.
        zeroed: share of a filter's weights that become zero.
        most_lost: accuracy that this may cost before the tuning, in 0..1.
        smooth: weight of the second gradient.
        rho: length of the way to it, for each tensor.

    Example:
        >>> fst_fast.methods.get("tsbd", zeroed=0.5).zeroed
        0.5
    """

    name: ClassVar[str] = "tsbd"
    cost: ClassVar[str] = "2"
    needs: ClassVar[str] = "a convolution"

    images: int = 500
    unlearn_lr: float = 1e-4
    forgotten: float = 0.1
    passes: int = 60
    zeroed: float = 0.7
    most_lost: float = 0.1
    smooth: float = 0.7
    rho: float = 0.05

    def __post_init__(self) -> None:
        check_counts(self, images=1, passes=0)
        check_numbers(self, **dict.fromkeys(("forgotten", "zeroed", "most_lost"), (0, 1)))
        check_numbers(self, smooth=(0, 1), unlearn_lr=(0, math.inf), rho=(0, math.inf))

    def begin(self, run: Run) -> None:
        run.memo["filters"] = _filters(run.model, self.name)
        images, labels = run.sample(self.images, 256 * 2**20)
        run.memo["ascent"] = Ascent(run, images, labels, self.unlearn_lr)
        run.memo["weights"] = KeptTensors(run.model.parameters())
        run.memo["statistics"] = KeptTensors(run.model.buffers())

    def begin_epoch(self, run: Run, epoch: int) -> None:
        if epoch == 0 and not run.goes_on_within:
            ascent: Ascent = run.memo["ascent"]
            ascent.forget(self.forgotten, self.passes)
            forgetful = _filters(ascent.model, self.name)
            set_back(run, run.memo["filters"], forgetful, self.zeroed, self.most_lost)

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        out = closure(batch)
        weights: list[Tensor] = [p for p in run.model.parameters() if p.grad is not None]
        first = [weight.grad for weight in weights if weight.grad is not None]
        with run.memo["weights"].unchanged(), run.memo["statistics"].unchanged():
            # A norm of zero has no direction.
            lengths = [norm.clamp(min=1e-12) for norm in torch._foreach_norm(first)]
            ways = torch._foreach_div(first, lengths)
            with torch.no_grad():
                torch._foreach_add_(weights, [*ways], alpha=self.rho)
            closure(batch)
        second = [weight.grad for weight in weights if weight.grad is not None]
        torch._foreach_mul_(second, self.smooth)
        torch._foreach_add_(second, first, alpha=1 - self.smooth)
        return out


@torch.no_grad()
def set_back(
    run: Run, filters: list[Tensor], moved: list[Tensor], zeroed: float, most_lost: float
) -> None:
    """Zero most of the filters that moved most, in as many as the accuracy allows.

    Args:
        filters: weights of convolutions, each [O, I, H, W]; changed in place.
        moved: where they went.
        zeroed: share of a filter's weights that become zero, those that moved most.
        most_lost: of the accuracy on clean images, in 0..1.
    """
    changes = [(one - other).abs().flatten(1) for one, other in zip(moved, filters, strict=True)]
    by_filter = torch.cat([change.sum(1) for change in changes])
    order = by_filter.argsort(descending=True, stable=True)
    originals = [weight.clone() for weight in filters]
    emptied = [
        weight * _stays(change, zeroed).view_as(weight)
        for weight, change in zip(filters, changes, strict=True)
    ]

    def put(count: int) -> None:
        chosen = torch.zeros_like(by_filter, dtype=torch.bool)
        chosen[order[:count]] = True
        parts = chosen.split([len(weight) for weight in filters])
        for weight, whole, empty, part in zip(filters, originals, emptied, parts, strict=True):
            weight.copy_(torch.where(part[:, None, None, None], empty, whole))

    counts = sorted({round(share * len(by_filter)) for share in SHARES} - {0})
    largest_allowed(run, 0, counts, put, most_lost)


def _stays(changes: Tensor, zeroed: float) -> Tensor:
    """Return 0 for the share of each row [N] of changes that are largest, else 1."""
    count = round(zeroed * changes.shape[1])
    rows = changes.topk(count, 1).indices
    return torch.ones_like(changes).scatter_(1, rows, 0)


def _filters(model: nn.Module, method: str) -> list[Tensor]:
    """Return the weights of a model's convolutions."""
    found: list[Tensor] = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not found:
        raise ValueError(
            f"{method}: model must have a convolution, got {type(model).__name__} without any; "
            f"{INSTEAD}"
        )
    return found
