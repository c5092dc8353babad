"""Batch norm of a model, and the convolutions that feed it, found by what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

INSTEAD = "use d3, ft_sam, pam or trigger_unlearning, which tune any classifier"


def affine_norms(model: nn.Module, method: str) -> list[_BatchNorm]:
    """Return the batch norms of a model that have a weight and a bias.

    Raises:
        ValueError: there is none.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    found = [m for m in norms if m.weight is not None and m.bias is not None]
    if not found:
        raise ValueError(
            f"{method}: model must have batch norm with a weight and a bias, got "
            f"{type(model).__name__} without any; {INSTEAD}"
        )
    return found


@torch.no_grad()
def convolution_norms(
    model: nn.Module, images: Tensor, method: str
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Return each convolution whose output goes straight into a batch norm, with that norm.

    The images are run through the model once, in its present mode: names and the order of the
    layers play no part.

    Args:
        images: [B, C, H, W]; only their shape matters.
    Raises:
        ValueError: there is no such pair.
    """
    # The outputs are kept as well, as a new tensor could take the place of one that is gone.
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}

    def after_convolution(module: Any, given: Any, output: Tensor) -> None:
        made[id(output)] = (module, output)

    def before_norm(module: Any, given: Any) -> None:
        complete = None not in (module.running_var, module.weight, module.bias)
        if complete and id(given[0]) in made:
            pairs[module] = made[id(given[0])][0]

    handles = [
        *(m.register_forward_hook(after_convolution) for m in _all(model, nn.Conv2d)),
        *(m.register_forward_pre_hook(before_norm) for m in _all(model, nn.BatchNorm2d)),
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not pairs:
        raise ValueError(
            f"{method}: model must have a convolution that feeds a batch norm, got "
            f"{type(model).__name__} without any; {INSTEAD}"
        )
    return [(convolution, norm) for norm, convolution in pairs.items()]


def _all(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]
