"""Sharpness-aware fine-tuning (FT-SAM; Zhu et al., ICCV 2023, arXiv 2304.11823)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Batch, Closure, HeadState, Method, Run
from .checks import check_numbers
from .kept import KeptTensors


@dataclass(frozen=True)
class FTSAM(Method):
    """Tune every parameter with the gradient at the worst weights nearby.

    With ``g`` the gradient at the weights ``w`` and ``T = diag |w|``, the step at ``w`` takes the
    gradient at ``w + rho * T^2 g / ||T g||`` (adaptive sharpness-aware minimisation, Kwon et al.,
    ICML 2021, arXiv 2102.11600), which shrinks the large weights that a backdoor goes by. A step
    takes two passes forward and backward.

    The defaults are the authors' for CIFAR-10; they use ``rho=8`` for GTSRB and Tiny ImageNet, 100
    epochs, lr 0.01, momentum 0.9, batches of 256. Their weight decay of 5e-4 is left out, as the
    loop has none. Batch norm's statistics, the loss and the accuracy are those of the first pass.

    Args:
        rho: radius of the neighbourhood; 0 is plain tuning.
        label_smoothing: of the cross-entropy.

    Example:
        >>> fst_fast.methods.get("ft_sam", rho=8.0)
        FTSAM(project=False, rho=8.0, label_smoothing=0.1)
    """

    name: ClassVar[str] = "ft_sam"
    cost: ClassVar[str] = "2"

    rho: float = 2.0
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(self, rho=(0, math.inf), label_smoothing=(0, 1))

    def loss(self, logits: Tensor, labels: Tensor, head: HeadState) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def begin(self, run: Run) -> None:
        run.memo["weights"] = KeptTensors(run.model.parameters())
        run.memo["statistics"] = KeptTensors(run.model.buffers())

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        out = closure(batch)
        weights: list[Tensor] = [p for p in run.model.parameters() if p.grad is not None]
        with run.memo["weights"].unchanged(), run.memo["statistics"].unchanged():
            with torch.no_grad():
                torch._foreach_add_(weights, [*adaptive_ascent(weights, self.rho)])
            closure(batch)
        return out


def adaptive_ascent(weights: list[Tensor], rho: float) -> tuple[Tensor, ...]:
    """Return ``rho * T^2 g / ||T g||`` for weights that have gradients, with T = diag |w|."""
    sizes = torch._foreach_abs([weight.detach() for weight in weights])
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    scaled = torch._foreach_mul(sizes, gradients)
    length = torch.stack(torch._foreach_norm(scaled)).norm()
    torch._foreach_mul_(scaled, sizes)
    # There is no direction where all gradients are zero.
    torch._foreach_mul_(scaled, rho / length.clamp(min=1e-12))
    return scaled
