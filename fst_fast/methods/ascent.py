"""The unlearning of clean images on a copy of the suspect, to look at what is left there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Run
from .tuned_copy import TunedCopy

# Gradients have at most this norm, and steps this many images.
_MOST_NORM, _BATCH = 20.0, 128


class Ascent:
    """A copy of the suspect that forgets clean images, by SGD with momentum.

    Its steps draw their images, and their gradients have a norm of 20 at most.

    Args:
        run: the copy is registered there.
        images, labels: [N, C, H, W] and [N] int64, clean.
        lr: learning rate of the ascent.
    Attributes:
        model: the copy, in train mode.
    """

    def __init__(self, run: Run, images: Tensor, labels: Tensor, lr: float) -> None:
        self._run, self._images, self._labels = run, images, labels
        self._copy = TunedCopy(run, "forgetful", lr)
        self.model = self._copy.model
        self._size = min(_BATCH, len(labels))
        self._right = torch.zeros((), device=labels.device)
        run.register("forgetful.right", self._right)

    def forget(self, forgotten: float, passes: int) -> None:
        """Climb until at most a share of the images is answered rightly, for so many passes."""
        for _ in range(passes):
            if self.accuracy_of_a_pass() <= forgotten:
                return

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
        gradients = torch.autograd.grad(loss, self._copy.weights, materialize_grads=True)
        length = torch.stack(torch._foreach_norm(gradients)).norm()
        clipped = torch._foreach_mul(gradients, (_MOST_NORM / length.clamp(min=1e-6)).clamp(max=1))
        self._copy.descend(clipped)
