"""A model as a search sees it: a copy that takes pixels in 0..1 and gives logits."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..data.batches import autocast, memory_layout
from ..heads.find import find_head
from ..heads.output import logits_of
from ..methods.probabilities import ENDINGS, are_probabilities
from .arguments import check_output, ending_of

# The input gradient is looked at on so many images.
_LOOKED_AT = 4


class SuspectView:
    """A frozen float32 copy of a model, in eval mode on the device; the model is left alone.

    Args:
        model: without wrappers.
        images: a few [B, C, H, W] that it takes, on the CPU or the device.
        device: where the copy is.
        precision: "fp32", "bf16" or "fp16".
    Attributes:
        model: the copy.
        classes: how many it has.
    Raises:
        ValueError: the model does not take the images, returns no logits [B, K], or its input
            gradient is zero or not finite.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, device: torch.device, precision: str
    ) -> None:
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise ValueError(
                "search: model must have its weights in memory, got some on the device meta; load "
                "its state dict first"
            )
        self.device, self.precision = device, precision
        self.model = copy.deepcopy(model).to(device).float().eval().requires_grad_(False)
        self.low: Tensor | float = 0.0
        self.span: Tensor | float = 1.0
        few = images[:_LOOKED_AT].to(device, torch.float32)
        self._layout = memory_layout(self.model, few)
        self.model.to(memory_format=self._layout)
        outputs = self._outputs(few)
        self.classes = outputs.shape[1]
        ending = self._ending(few, outputs)
        self._undo_ending = None if ending is None else ENDINGS[ending]
        self._check_gradient(few)

    def set_range(self, low: Tensor, span: Tensor) -> None:
        """From now on, pixels x are given to the model as ``x * span + low``."""
        self.low, self.span = low, span

    def logits(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """Return logits [B, K] float32 of images [B, C, H, W] in 0..1.

        Args:
            images: on the device.
            model: another copy that takes the place of this one's.
        """
        placed = (images * self.span + self.low).contiguous(memory_format=self._layout)
        with autocast(self.device, self.precision):
            outputs = logits_of((self.model if model is None else model)(placed)).flatten(1)
        return (outputs if self._undo_ending is None else self._undo_ending(outputs)).float()

    def _outputs(self, images: Tensor) -> Tensor:
        """The checked output [B, K] for the first images."""
        with torch.no_grad():
            try:
                output = self.model(images.contiguous(memory_format=self._layout))
            except Exception as error:
                raise ValueError(
                    f"search: model must take the loader's images {list(images.shape)}, got "
                    f"{type(error).__name__}: {error}; check their channels and size"
                ) from error
        check_output(output, "search")
        outputs = logits_of(output)
        size = list(outputs.shape)
        if size[:1] != [len(images)] or len(size) < 2 or any(n != 1 for n in size[2:]):
            raise ValueError(
                f"search: model must return logits [{len(images)}, classes], one row per image, "
                f"got {size}; wrap a model of another kind in one that does"
            )
        if size[1] < 2:
            raise ValueError(
                f"search: model must have two classes or more, got {size[1]}; wrap one of a single "
                "output z in a module that returns torch.cat([0 * z, z], 1)"
            )
        return outputs.flatten(1)

    def _ending(self, images: Tensor, outputs: Tensor) -> str | None:
        """The name in ENDINGS of what the model ends in: its saturation would hide the gradient."""
        try:
            head = find_head(self.model, example=images)
        except ValueError:
            # A softmax shows in the outputs alone.
            return "softmax" if are_probabilities(outputs) else None
        return ending_of(self.model, head, images)

    def _check_gradient(self, images: Tensor) -> None:
        """Raise ValueError where nothing can be searched: the logits do not follow the pixels."""
        images = images.detach().clone().requires_grad_()
        generator = torch.Generator().manual_seed(0)
        with torch.enable_grad():
            logits = self.logits(images)
            weights = torch.randn(logits.shape, generator=generator).to(self.device)
            total = (logits * weights).sum()
            follows = total.requires_grad
            gradient = torch.autograd.grad(total, images, allow_unused=True)[0] if follows else None
        if not logits.isfinite().all():
            got = "logits that are not finite"
        elif gradient is None or not gradient.count_nonzero():
            got = "a gradient of zero"
        elif not gradient.isfinite().all():
            got = "a gradient that is not finite"
        else:
            return
        raise ValueError(
            "search: model must have a finite gradient with respect to its input that is not zero, "
            f"got {got}; a model that rounds, thresholds or runs under no_grad cannot be searched "
            "by gradients: take these steps out of its forward"
        )
