"""Adversarial Neuron Pruning (ANP; Wu and Wang, NeurIPS 2021, arXiv 2110.14430)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Batch, Closure, Method, Run
from .channel_masks import ChannelMasks
from .checks import check_numbers
from .kept import KeptTensors
from .norms import affine_norms


@dataclass(frozen=True)
class ANP(Method):
    """Learn masks of channels under adversarial noise on them, and prune those with small masks.

    Each channel of a batch norm has a mask m in 0..1: it computes
    ``(m + delta) * gamma * x + (1 + xi) * beta``. The masks minimise
    ``share * loss(delta = xi = 0) + (1 - share) * max loss(|delta|, |xi| <= noise)`` by SGD; the
    inner maximum is one signed step from a random place. A step takes three passes forward and
    backward, the latter without the gradients of convolutions. The model's weights stand still; at
    the end, the weights (gamma) of channels with masks below a threshold become zero.

    The defaults of ``noise``, ``share`` and ``lr`` are the authors'; they make 2,000 steps: give
    ``epochs`` accordingly. The published choice of the threshold asks for the attack. Here it is
    the largest one, in steps of 0.05, that costs at most ``most_lost`` of the accuracy on clean
    images: those of ``validation``, else those of the loader. That takes up to 20 passes forward
    over them.

    Args:
        noise: largest relative change of a weight and a bias.
        share: weight of the loss without noise, in 0..1.
        lr: learning rate of the masks; the run's own has no effect.
        most_lost: accuracy that pruning may cost, in 0..1.

    Example:
        >>> fst_fast.methods.get("anp", most_lost=0.02)
        ANP(project=False, noise=0.4, share=0.2, lr=0.2, most_lost=0.02)
    """

    name: ClassVar[str] = "anp"
    cost: ClassVar[str] = "2"
    needs: ClassVar[str] = "batch norm"

    noise: float = 0.4
    share: float = 0.2
    lr: float = 0.2
    most_lost: float = 0.05

    def __post_init__(self) -> None:
        check_numbers(self, noise=(0, math.inf), share=(0, 1), lr=(0, math.inf), most_lost=(0, 1))

    def begin(self, run: Run) -> None:
        norms = affine_norms(run.model, self.name)
        run.memo["masks"] = ChannelMasks(norms)
        run.memo["masks"].register(run)
        # The statistics of a batch under noise are not the model's either.
        affine = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
        run.memo["kept"] = KeptTensors([*affine, *run.model.buffers()])
        # No other gradient is asked for, which spares a third of each pass.
        run.model.requires_grad_(False)
        for norm in norms:
            norm.requires_grad_()

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        masks: ChannelMasks = run.memo["masks"]
        with run.memo["kept"].unchanged():
            noises = [self.noise * (2 * torch.rand_like(masks.mask) - 1) for _ in range(2)]
            masks.put(masks.mask + noises[0], 1 + noises[1])
            closure(batch)
            noises = [
                (noise + self.noise * gradient.sign()).clamp(-self.noise, self.noise)
                for noise, gradient in zip(noises, masks.gradients(run.loss_scale), strict=True)
            ]
            masks.put(masks.mask + noises[0], 1 + noises[1])
            closure(batch)
            robust, _ = masks.gradients(run.loss_scale)
            masks.put(masks.mask)
            out = closure(batch)
            natural, _ = masks.gradients(run.loss_scale)
        masks.descend(self.share * natural + (1 - self.share) * robust, self.lr)
        run.model.zero_grad(set_to_none=True)
        return out

    def finish(self, run: Run) -> None:
        run.memo["masks"].prune(run, self.most_lost)
