"""A linear layer behind a convolution and its batch norm, which becomes part of both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..heads.output import logits_of
from .norms import INSTEAD, convolution_norms

# A folded model may differ by this share of its logits' size, in float32.
_TOLERANCE = 1e-3


class Polarizer:
    """The layer ``A z + b`` over the channels of what a batch norm gives.

    Args:
        convolution: without groups; its output goes into ``norm`` alone.
        norm: with a weight, a bias and running statistics, in eval mode.
    Attributes:
        matrix: [C, C], A; the identity at the start.
        shift: [C], b; zero at the start.
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        self.convolution, self.norm = convolution, norm
        weight = norm.weight.detach()
        self.matrix = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        self.shift = torch.zeros_like(weight)

    @contextmanager
    def at_work(self, matrix: Tensor, shift: Tensor) -> Iterator[None]:
        """Within, the model has the layer, with these for A and b."""

        def change(module: nn.Module, given: object, output: Tensor) -> Tensor:
            kernel = matrix.to(output.dtype)[:, :, None, None]
            return F.conv2d(output, kernel, shift.to(output.dtype))

        handle = self.norm.register_forward_hook(change)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def fold(self, run_model: Callable[[], object]) -> None:
        """Make the layer part of the convolution and the batch norm; both are changed in place.

        The batch norm gets the running statistics of its new input. Their mean is exact; the
        variance is measured, and the batch norm's weight undoes whatever that comes to.

        Args:
            run_model: runs clean images through the model, in eval mode.
        """
        norm, convolution = self.norm, self.convolution
        assert norm.running_mean is not None
        assert norm.running_var is not None
        joint = self.matrix * (norm.weight / (norm.running_var + norm.eps).sqrt())
        convolution.weight.copy_(torch.einsum("oc,cihw->oihw", joint, convolution.weight))
        if convolution.bias is not None:
            convolution.bias.copy_(joint @ convolution.bias)
        norm.running_mean.copy_(joint @ norm.running_mean)
        norm.bias.copy_(self.matrix @ norm.bias + self.shift)
        seen: list[Tensor] = []
        handle = norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        try:
            run_model()
        finally:
            handle.remove()
        norm.running_var.copy_(seen[0].to(norm.weight.dtype).var((0, 2, 3), unbiased=False))
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())


def place_for(model: nn.Module, images: Tensor, method: str) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Return the last but one convolution with its batch norm that a layer can be folded into.

    Args:
        model: in eval mode; left as it is.
        images: [B, C, H, W] a few of them.
    Raises:
        ValueError: there is none.
    """
    pairs = convolution_norms(model, images, method)
    first = max(0, len(pairs) - 2)
    # From there towards the input, and then what lies behind.
    for pair in [*pairs[first::-1], *pairs[first + 1 :]]:
        if _is_exact(model, pair, images):
            return pair
    raise ValueError(
        f"{method}: model must have a convolution without groups whose output goes into one batch "
        f"norm alone, got {type(model).__name__} without any; {INSTEAD}"
    )


@torch.no_grad()
def _is_exact(model: nn.Module, pair: tuple[nn.Conv2d, nn.BatchNorm2d], images: Tensor) -> bool:
    """Return whether a copy of the model with a folded layer computes the same as with the layer.

    It does not where the convolution has groups, or one of both has another use as well.
    """
    names = {id(module): name for name, module in model.named_modules()}
    twin = copy.deepcopy(model)
    convolution, norm = (twin.get_submodule(names[id(module)]) for module in pair)
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    layer = Polarizer(convolution, norm)
    layer.matrix += 0.5 * layer.matrix.roll(1, 0)
    layer.shift += 0.1
    with layer.at_work(layer.matrix, layer.shift):
        wanted = logits_of(twin(images))
    layer.fold(lambda: twin(images))
    found = logits_of(twin(images))
    return bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
