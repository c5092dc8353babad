"""Neural Polarizer Defense (NPD; Zhu et al., NeurIPS 2023, arXiv 2306.16697)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Batch, Closure, Method, Run
from .checks import check_counts, check_numbers
from .polarizer import Polarizer, place_for
from .sau import log_of_others

# So many clean images are kept, in so many bytes.
_IMAGES, _IMAGE_BYTES = 512, 256 * 2**20
_MOMENTUM = 0.9


@dataclass(frozen=True)
class NPD(Method):
    """Learn one linear layer within the frozen suspect that holds adversarial changes back.

    The layer is ``A z + b`` over the channels z of one place. For each image x with label y, a
    change d of Euclidean norm ``radius`` at most is searched that makes the answer the most likely
    wrong class t, by ``steps`` steps of gradient descent of ``radius / steps`` each. A and b then
    minimise
    ``CE(x) + adversarial * CE(x + d) - target * log(1 - p_t) - others * log(1 - p_k)`` by SGD with
    momentum 0.9, where k is the most likely wrong class of x + d, and p are its probabilities.

    The weights and ``lr`` are those of the authors' code, which tunes for 50 epochs: give
    ``epochs`` accordingly. It has a convolution and a batch norm as the layer. This is our
    reconstruction of it: the layer stands behind a convolution and its batch norm and starts as the
    identity, which takes the place of their five epochs of warm-up; the suspect stays in eval mode.
    At the end the layer becomes part of the convolution and the batch norm before it, so that the
    model keeps its classes and keys and computes the same. The place is the last but one
    convolution with a batch norm behind it (theirs, ``layer4.1.conv1``, in a ResNet-18), or the
    nearest one where a copy of the model shows that this is exact.

    Args:
        radius: of the change, for pixels in 0..1.
        steps: of its search.
        adversarial, target, others: weights in the loss.
        lr: learning rate of the layer; the run's own has no effect.

    Example:
        >>> fst_fast.methods.get("npd", steps=3)
        NPD(project=False, radius=3.0, steps=3, adversarial=0.4, target=0.4, others=0.4, lr=0.01)
    """

    name: ClassVar[str] = "npd"
    cost: ClassVar[str] = "about 2"
    data_parallel: ClassVar[bool] = False
    needs: ClassVar[str] = "a convolution that feeds a batch norm"
    # Its loss is one of two batches' logits.
    needs_logits: ClassVar[bool] = True

    radius: float = 3.0
    steps: int = 2
    adversarial: float = 0.4
    target: float = 0.4
    others: float = 0.4
    lr: float = 0.01

    def __post_init__(self) -> None:
        names = ("radius", "adversarial", "target", "others", "lr")
        check_numbers(self, **dict.fromkeys(names, (0, math.inf)))
        check_counts(self, steps=1)

    def begin(self, run: Run) -> None:
        run.model.eval()
        images, _ = run.sample(_IMAGES, _IMAGE_BYTES)
        convolution, norm = place_for(run.model, images[:2], self.name)
        polarizer = Polarizer(convolution, norm)
        tensors = [polarizer.matrix, polarizer.shift]
        velocity = [torch.zeros_like(tensor) for tensor in tensors]
        for number, tensor in enumerate([*tensors, *velocity]):
            run.register(f"polarizer.{number}", tensor)
        run.memo["polarizer"], run.memo["velocity"] = polarizer, velocity
        run.memo["images"], run.memo["range"] = images, run.pixel_range(images)
        run.model.requires_grad_(False)

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        polarizer: Polarizer = run.memo["polarizer"]
        labels, images = batch.labels, batch.inputs
        run.model.eval()
        leaves = [t.clone().requires_grad_() for t in (polarizer.matrix, polarizer.shift)]
        with polarizer.at_work(*leaves):
            clean = run.logits(images)
        wrong = most_likely_wrong(clean, labels)
        with polarizer.at_work(polarizer.matrix, polarizer.shift):
            changed = self._changed(run, images, wrong)
        with polarizer.at_work(*leaves):
            attacked = run.logits(changed)
        loss = F.cross_entropy(clean, labels)
        loss = loss + self.adversarial * F.cross_entropy(attacked, labels)
        loss = loss - self.target * log_of_others(attacked, wrong).mean()
        likely = most_likely_wrong(attacked, labels)
        loss = loss - self.others * log_of_others(attacked, likely).mean()
        self._descend(run, leaves, torch.autograd.grad(loss * run.loss_scale, leaves))
        run.model.train()
        return loss.detach(), (clean.argmax(1) == labels).sum()

    def _changed(self, run: Run, images: Tensor, wrong: Tensor) -> Tensor:
        """Return the images with the changes that make the answers these."""
        low, high = run.memo["range"]
        span = high - low
        change = torch.zeros_like(images)
        for _ in range(self.steps):
            change.requires_grad_()
            shown = (images + change * span).clamp(low, high)
            loss = F.cross_entropy(run.logits(shown), wrong, reduction="sum")
            (slope,) = torch.autograd.grad(loss, change)
            length = slope.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
            change = (change - self.radius / self.steps * slope / length).detach()
        return (images + change * span).clamp(low, high)

    @torch.no_grad()
    def _descend(self, run: Run, leaves: list[Tensor], scaled: tuple[Tensor, ...]) -> None:
        """Make one step of the layer by SGD; what a loss scale has made overflow is 0."""
        polarizer: Polarizer = run.memo["polarizer"]
        for tensor, velocity, gradient in zip(
            (polarizer.matrix, polarizer.shift), run.memo["velocity"], scaled, strict=True
        ):
            velocity.mul_(_MOMENTUM).add_(torch.nan_to_num(gradient / run.loss_scale, 0, 0, 0))
            tensor.sub_(self.lr * velocity)

    def finish(self, run: Run) -> None:
        run.model.eval()
        run.memo["polarizer"].fold(lambda: run.logits(run.memo["images"]))


def most_likely_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the class of the greatest logit beside the label's, [B], of logits [B, K]."""
    return logits.detach().scatter(1, labels[:, None], -math.inf).argmax(1)
