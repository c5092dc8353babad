"""Implicit Backdoor Adversarial Unlearning (I-BAU; Zeng et al., ICLR 2022, arXiv 2110.03735)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Batch, Closure, Method, Run
from .checks import check_counts, check_numbers

# So many clean images are kept for the search, in so many bytes.
_IMAGES, _IMAGE_BYTES = 1024, 256 * 2**20
# The inner problem's gradient step, whose fixed point the hypergradient is taken at.
_FIXED_POINT_LR = 0.1


@dataclass(frozen=True)
class IBAU(Method):
    """Solve min over weights max over one universal change, by an implicit hypergradient.

    The change d of all images maximises ``cross-entropy(x + d) - penalty * ||d||^2`` by
    ``search_steps`` steps of gradient ascent from zero, before every epoch. A step of tuning takes
    the cross-entropy f of a batch with d on a ``share`` of its images, and the gradient that
    follows d as the weights move: with the inner step ``s(d) = d - 0.1 * grad g(d)``, where g is
    the negative of what the search maximises,
    ``grad f + (ds/dw)^T v`` with ``v = (ds/dd)^T v + df/dd``, iterated ``iterations`` times from
    zero.

    The defaults are those of the authors' code, whose search is one pass over 2,500 images. They
    step with Adam at 1e-4 in 5 rounds; here the loop's SGD takes its place, and a round is an
    epoch. Our choices: the search draws its batches, both losses of a step are those of its batch
    (with the change on one image at least), and the model stays in eval mode. A step takes
    about ``iterations + 3`` passes forward and backward.

    Args:
        share: of each batch that carries the change.
        search_lr: learning rate of the search.
        search_steps: before every epoch.
        search_batch: images in a step of the search.
        penalty: weight of the change's squared norm.
        iterations: of the fixed point; 0 is plain adversarial tuning.

    Example:
        >>> fst_fast.methods.get("i_bau", iterations=3).iterations
        3
    """

    name: ClassVar[str] = "i_bau"
    cost: ClassVar[str] = "about 8"
    # Its gradients are those of gradients, which the fused loss does not have.
    needs_logits: ClassVar[bool] = True

    share: float = 0.01
    search_lr: float = 10.0
    search_steps: int = 20
    search_batch: int = 128
    penalty: float = 0.001
    iterations: int = 5

    def __post_init__(self) -> None:
        check_numbers(self, share=(0, 1), search_lr=(0, math.inf), penalty=(0, math.inf))
        check_counts(self, search_steps=0, search_batch=1, iterations=0)

    def begin(self, run: Run) -> None:
        images, labels = run.sample(_IMAGES, _IMAGE_BYTES)
        run.memo["images"], run.memo["labels"] = images, labels
        run.memo["change"] = torch.zeros_like(images[:1])
        run.register("change", run.memo["change"])

    def begin_epoch(self, run: Run, epoch: int) -> None:
        if not run.goes_on_within:
            run.memo["change"].zero_()
            run.model.eval()
            run.repeat("search", lambda: self._search(run), self.search_steps)

    def _inner(self, run: Run, images: Tensor, labels: Tensor, change: Tensor) -> Tensor:
        loss = F.cross_entropy(run.logits(images + change), labels)
        return self.penalty * change.square().sum() - loss

    def _search(self, run: Run) -> None:
        """Make one step of the change."""
        images, labels, change = (run.memo[name] for name in ("images", "labels", "change"))
        rows = torch.randint(len(labels), (self.search_batch,), device=labels.device)
        moved = change.clone().requires_grad_()
        inner = self._inner(run, images[rows], labels[rows], moved)
        (gradient,) = torch.autograd.grad(inner, moved)
        change.sub_(self.search_lr * gradient)

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        inputs, labels = batch.inputs, batch.labels
        run.model.eval()
        change = run.memo["change"].clone().requires_grad_()
        count = max(1, round(self.share * len(labels)))
        rows = torch.rand(len(labels), device=labels.device).argsort()[:count]
        carries = torch.zeros_like(inputs[:, :1, :1, :1]).index_fill_(0, rows, 1)
        logits = run.logits(inputs + carries * change)
        outer = F.cross_entropy(logits, labels)
        inner = self._inner(run, inputs, labels, change) if self.iterations else None
        weights = [p for p in run.model.parameters() if p.requires_grad]
        found = hypergradient(outer, inner, change, weights, self.iterations)
        run.model.zero_grad(set_to_none=True)
        for weight, gradient in zip(weights, found, strict=True):
            weight.grad = gradient * run.loss_scale
        run.model.train()
        return outer.detach(), (logits.argmax(1) == labels).sum()


def hypergradient(
    outer: Tensor,
    inner: Tensor | None,
    change: Tensor,
    weights: Sequence[Tensor],
    iterations: int,
) -> list[Tensor]:
    """Return the gradient of ``outer`` in the weights, along which ``change`` minimises ``inner``.

    Args:
        outer, inner: 0-d losses, with their graphs; without ``inner`` the change stands still.
        change: a leaf that both depend on.
        weights: leaves.
        iterations: of the fixed point.
    """
    step, *direct = torch.autograd.grad(outer, [change, *weights], materialize_grads=True)
    if inner is None:
        return direct
    (slope,) = torch.autograd.grad(inner, change, create_graph=True)
    solution = torch.zeros_like(change)
    for _ in range(iterations):
        (curved,) = torch.autograd.grad(slope, change, solution, retain_graph=True)
        solution = solution - _FIXED_POINT_LR * curved + step
    mixed = torch.autograd.grad(slope, weights, solution, materialize_grads=True)
    return [one - _FIXED_POINT_LR * other for one, other in zip(direct, mixed, strict=True)]
