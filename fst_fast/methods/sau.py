"""Shared Adversarial Unlearning (SAU; Wei et al., NeurIPS 2023, arXiv 2307.10562)."""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Batch, Closure, Method, Run
from .checks import check_counts, check_numbers


@dataclass(frozen=True)
class SAU(Method):
    """Unlearn the adversarial changes that fool the suspect and the tuned model alike.

    For each image a change of at most ``radius`` per pixel is searched that maximises
    ``adversarial * cross-entropy - JS(tuned model, suspect)``, where JS is the Jensen-Shannon
    divergence of the two answers, by signed steps of ``radius``, until both models err alike. A
    step of tuning then minimises
    ``cross-entropy of the images - shared * mean log(1 - p(t | changed image))``, where t is what
    the suspect answers; images that it still answers rightly do not count in the mean.

    The defaults are those of BackdoorBench's code. The authors step with Adam at 1e-4 for 100
    epochs, without augmentation; here the loop's SGD takes its place. A step takes about
    ``2 * steps + 3`` passes forward and ``2 * steps + 2`` backward, the most of them to the images
    alone. The search starts from the image itself and runs in eval mode, which is our choice.

    Args:
        radius: most that a pixel changes, as a share of the pixels' range.
        steps: of the search.
        adversarial: weight of the cross-entropy in the search.
        shared: weight of the changed images in the loss.

    Example:
        >>> fst_fast.methods.get("sau", steps=3)
        SAU(project=False, radius=0.2, steps=3, adversarial=0.01, shared=1.0)
    """

    name: ClassVar[str] = "sau"
    cost: ClassVar[str] = "about 9"
    # Its loss is one of two batches' logits.
    needs_logits: ClassVar[bool] = True

    radius: float = 0.2
    steps: int = 5
    adversarial: float = 0.01
    shared: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, radius=(0, 1), adversarial=(0, math.inf), shared=(0, math.inf))
        check_counts(self, steps=1)

    def begin(self, run: Run) -> None:
        run.memo["suspect"] = copy.deepcopy(run.model).eval().requires_grad_(False)
        images, _ = run.sample(1024, 256 * 2**20)
        run.memo["range"] = run.pixel_range(images)

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        labels, suspect = batch.labels, run.memo["suspect"]
        run.model.eval()
        changed = self._changed(run, batch)
        run.model.train()
        with torch.no_grad():
            answers = run.logits(changed, suspect).argmax(1)
        logits = run.logits(torch.cat([batch.inputs, changed]))
        clean, attacked = logits.split(len(labels))
        counts = (answers != labels).to(logits.dtype)
        unlearnt = (counts * log_of_others(attacked, answers)).mean()
        loss = F.cross_entropy(clean, labels) - self.shared * unlearnt
        run.model.zero_grad(set_to_none=True)
        (loss * run.loss_scale).backward()
        return loss.detach(), (clean.argmax(1) == labels).sum()

    def _changed(self, run: Run, batch: Batch) -> Tensor:
        """Return the images of the batch with the changes that fool both models."""
        low, high = run.memo["range"]
        radius = self.radius * (high - low)
        change = torch.zeros_like(batch.inputs)
        for _ in range(self.steps):
            change.requires_grad_()
            shown = (batch.inputs + change).clamp(low, high)
            ours, theirs = run.logits(shown), run.logits(shown, run.memo["suspect"])
            score = self.adversarial * F.cross_entropy(ours, batch.labels) - divergence(
                ours, theirs
            )
            (gradient,) = torch.autograd.grad(score, change)
            answers = ours.argmax(1)
            done = (answers == theirs.argmax(1)) & (answers != batch.labels)
            stepped = (change + radius * gradient.sign()).clamp(-radius, radius)
            change = torch.where(done[:, None, None, None], change, stepped).detach()
        return (batch.inputs + change).clamp(low, high)


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean Jensen-Shannon divergence of the answers with logits [B, K]."""
    logs = one.log_softmax(1), other.log_softmax(1)
    middle = torch.logaddexp(*logs) - math.log(2)
    parts = [(log.exp() * (log - middle)).sum(1).mean() for log in logs]
    return (parts[0] + parts[1]) / 2


def log_of_others(logits: Tensor, classes: Tensor) -> Tensor:
    """Return log(1 - p) of the class of each row of logits [B, K], exact where p is nearly 1."""
    others = logits.scatter(1, classes[:, None], -math.inf)
    return others.logsumexp(1) - logits.logsumexp(1)
