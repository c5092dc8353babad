"""Reconstructive Neuron Pruning (RNP; Li et al., ICML 2023, arXiv 2305.14876)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from .ascent import Ascent
from .base import Batch, Closure, Method, Run
from .channel_masks import ChannelMasks
from .checks import check_counts, check_numbers
from .norms import affine_norms


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
        ascent = run.memo["ascent"] = Ascent(run, images, labels, self.unlearn_lr)
        run.memo["norms"] = affine_norms(ascent.model, self.name)
        run.memo["masks"] = ChannelMasks(run.memo["norms"])
        run.memo["masks"].register(run)

    def begin_epoch(self, run: Run, epoch: int) -> None:
        ascent: Ascent = run.memo["ascent"]
        if epoch == 0 and not run.goes_on_within:
            ascent.forget(self.forgotten, self.passes)
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
