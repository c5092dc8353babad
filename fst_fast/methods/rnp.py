"""Reconstructive Neuron Pruning (RNP; Li et al., ICML 2023, arXiv 2305.14876)."""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Batch, Closure, Method, Run
from .channel_masks import ChannelMasks
from .checks import check_counts, check_numbers
from .norms import affine_norms

# Gradients of the unlearning have at most this norm, and its steps this many images.
_MOST_NORM, _BATCH = 20.0, 128
_MOMENTUM = 0.9


@dataclass(frozen=True)
class RNP(Method):
    """Unlearn the clean images in a copy, relearn them by masks, and prune what these leave out.

    First a copy of the suspect ascends the cross-entropy of a few clean images until at most
    ``forgotten`` of them are answered rightly: what is left there is the backdoor. Then masks in
    0..1 on the copy's batch-norm weights descend ``weight * cross-entropy``, in the steps of the
    run. Channels that the clean images need least back have the smallest masks; in the suspect
    their weights become zero.

    The defaults are those of the authors' code, which learns the masks for 20 epochs: give
    ``epochs`` accordingly. The published threshold is swept with the attack. Here it is the
    largest one, in steps of 0.05, that costs at most ``most_lost`` of the accuracy on clean images:
    those of ``validation``, else those of the loader. The unlearning draws its batches, which is
    our choice.

    Args:
        images: clean images that are unlearnt.
        unlearn_lr: learning rate of the ascent.
        forgotten: accuracy in 0..1 at which the ascent ends.
        passes: most passes of the ascent over the images.
        weight: of the cross-entropy, for the masks.
        lr: learning rate of the masks; the run's own has no effect.
        most_lost: accuracy that pruning may cost, in 0..1.

    Example:
        >>> fst_fast.methods.get("rnp", images=250).images
        250
    """

    name: ClassVar[str] = "rnp"
    cost: ClassVar[str] = "0.7"
    needs: ClassVar[str] = "batch norm"

    images: int = 500
    unlearn_lr: float = 0.01
    forgotten: float = 0.2
    passes: int = 20
    weight: float = 0.2
    lr: float = 0.2
    most_lost: float = 0.05

    def __post_init__(self) -> None:
        check_counts(self, images=1, passes=0)
        check_numbers(self, forgotten=(0, 1), most_lost=(0, 1))
        check_numbers(self, **dict.fromkeys(("unlearn_lr", "weight", "lr"), (0, math.inf)))

    def begin(self, run: Run) -> None:
        affine_norms(run.model, self.name)
        images, labels = run.sample(self.images, 256 * 2**20)
        ascent = run.memo["ascent"] = _Ascent(run, images, labels, self.unlearn_lr)
        run.memo["norms"] = affine_norms(ascent.model, self.name)
        run.memo["masks"] = ChannelMasks(run.memo["norms"])
        run.memo["masks"].register(run)

    def begin_epoch(self, run: Run, epoch: int) -> None:
        ascent: _Ascent = run.memo["ascent"]
        if epoch == 0 and not run.goes_on_within:
            for _ in range(self.passes):
                if ascent.accuracy_of_a_pass() <= self.forgotten:
                    break
            run.memo["masks"].look_again()
        ascent.model.requires_grad_(False)
        for norm in run.memo["norms"]:
            norm.requires_grad_()

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        forgetful, masks = run.memo["ascent"].model, run.memo["masks"]
        masks.put(masks.mask)
        logits = run.logits(batch.inputs, forgetful)
        loss = self.weight * F.cross_entropy(logits, batch.labels)
        forgetful.zero_grad(set_to_none=True)
        (loss * run.loss_scale).backward()
        masks.descend(masks.gradients(run.loss_scale)[0], self.lr)
        return loss.detach(), (logits.argmax(1) == batch.labels).sum()

    def finish(self, run: Run) -> None:
        masks = ChannelMasks(affine_norms(run.model, self.name))
        masks.mask.copy_(run.memo["masks"].mask)
        masks.prune(run, self.most_lost)


class _Ascent:
    """A copy of the suspect that forgets clean images, by SGD with momentum.

    Attributes:
        model: the copy, in train mode.
    """

    def __init__(self, run: Run, images: Tensor, labels: Tensor, lr: float) -> None:
        self._run, self._images, self._labels, self._lr = run, images, labels, lr
        self.model = copy.deepcopy(run.model).train().requires_grad_()
        self._weights: list[Tensor] = list(self.model.parameters())
        self._velocity = [torch.zeros_like(weight) for weight in self._weights]
        self._size = min(_BATCH, len(labels))
        self._right = torch.zeros((), device=labels.device)
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            run.register(f"forgetful.{name}", tensor)
        for number, tensor in enumerate([self._right, *self._velocity]):
            run.register(f"ascent.{number}", tensor)

    def accuracy_of_a_pass(self) -> float:
        """Make the steps of a pass; return the share of its images that were answered rightly."""
        self._right.zero_()
        steps = -(-len(self._labels) // self._size)
        self._run.repeat("unlearn", self._step, steps)
        return self._right.item() / (steps * self._size)

    def _step(self) -> None:
        rows = torch.randint(len(self._labels), (self._size,), device=self._labels.device)
        images, labels = self._images[rows], self._labels[rows]
        logits = self._run.logits(images, self.model)
        self._right.add_((logits.argmax(1) == labels).sum())
        loss = -F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, self._weights, materialize_grads=True)
        length = torch.stack(torch._foreach_norm(gradients)).norm()
        clipped = torch._foreach_mul(gradients, (_MOST_NORM / length.clamp(min=1e-6)).clamp(max=1))
        with torch.no_grad():
            torch._foreach_mul_(self._velocity, _MOMENTUM)
            torch._foreach_add_(self._velocity, [*clipped])
            torch._foreach_add_(self._weights, self._velocity, alpha=-self._lr)
