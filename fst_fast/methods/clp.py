"""Channel Lipschitzness-based Pruning (CLP; Zheng et al., ECCV 2022, arXiv 2208.03111)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import Batch, Closure, Method, Run
from .checks import check_numbers
from .norms import convolution_norms


@dataclass(frozen=True)
class CLP(Method):
    """Silence the channels that react most to small changes; no image is needed for that.

    A channel c of a convolution that feeds a batch norm has the Lipschitz bound
    ``sigma_max(W_c * gamma_c / sqrt(var_c + eps))``, the largest singular value of its folded
    filter as an [inputs, height * width] matrix. Channels with a bound above the layer's mean plus
    ``deviations`` standard deviations get a weight and a bias of zero in the batch norm.

    Nothing is trained. One pass over the loader measures the pruned model, whatever ``epochs``
    asks for. The paper uses 3 for CIFAR-10 and 5 for Tiny ImageNet.

    Args:
        deviations: standard deviations above the mean from which on a channel goes.

    Example:
        >>> fst_fast.methods.get("clp", deviations=5.0)
        CLP(project=False, deviations=5.0)
    """

    name: ClassVar[str] = "clp"
    cost: ClassVar[str] = "none"
    needs: ClassVar[str] = "a convolution that feeds a batch norm"
    # The backbone stands still once it is pruned.
    trains: ClassVar[Literal["all", "backbone", "head"]] = "head"

    deviations: float = 3.0

    def __post_init__(self) -> None:
        check_numbers(self, deviations=(0, math.inf))

    def begin(self, run: Run) -> None:
        images, _ = run.sample(2, 2**30)
        for convolution, norm in convolution_norms(run.model, images, self.name):
            bounds = lipschitz_bounds(convolution, norm)
            outliers = bounds > bounds.mean() + self.deviations * bounds.std()
            with torch.no_grad():
                norm.weight.masked_fill_(outliers, 0)
                norm.bias.masked_fill_(outliers, 0)
        run.epochs = 1

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        out = closure(batch)
        run.model.zero_grad(set_to_none=True)
        return out


@torch.no_grad()
def lipschitz_bounds(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Return the bound of each output channel, [C], of the two layers together."""
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = convolution.weight * scale[:, None, None, None]
    return torch.linalg.matrix_norm(folded.flatten(2), 2)
