"""A trigger behind a mask is inverted for every class (Neural Cleanse; Wang et al., S&P 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .adam import Adam
from .base import Run

# Adam's learning rate for the logits of masks and patterns.
_LR = 0.1
# A mask starts with this logit, which is an opacity of 0.12.
_START = -1.0
# The price of a mask's area rises by this factor in a step, while the trigger succeeds so often.
_DEARER, _SUCCEEDS = 1.05, 0.9
_LEAST_PRICE, _MOST_PRICE = 1e-2, 1e3
# The share of a class's success that a step makes up.
_LATEST = 0.2
# Small masks count among the classes that come so close to the most successful one.
_CLOSE = 0.75


class MaskInversion:
    """A mask m and a pattern p for each of K classes, so that ``(1 - m) x + m p`` is that class.

    Minimises the cross-entropy to the class on images of other classes, plus a price times the
    mask's mean, by Adam; the price of each class rises while its trigger succeeds, and falls while
    it does not. Nothing waits for the device.

    Args:
        run: runs the model, which must be in eval mode during a step; goes on from its tensors.
        images, labels: [N, C, H, W] and [N] int64, clean, to draw from.
        low, high: [1, C, 1, 1], the range of pixels.
        classes: to search triggers for.
        each: images of each class in a step.
        at_once: images that the model takes in one batch, at most, as far as ``each`` allows.
    Attributes:
        mask, pattern: [K, 1, H, W] and [K, C, H, W] of logits.
        targets: [K] int64, the classes.
        success: [K], the running share of images that are answered as the class.
    """

    def __init__(
        self,
        run: Run,
        images: Tensor,
        labels: Tensor,
        low: Tensor,
        high: Tensor,
        classes: Sequence[int],
        each: int,
        at_once: int = 256,
    ) -> None:
        self._run, self._images, self._labels = run, images, labels
        self._low, self._span, self._each = low, high - low, each
        self._together = max(1, at_once // each)
        count, device = len(classes), images.device
        self.targets = torch.tensor(classes, device=device)
        self.mask = torch.full_like(images[:1, :1], _START).repeat(count, 1, 1, 1)
        self.pattern = torch.zeros_like(images[:1]).repeat(count, 1, 1, 1)
        self.success = torch.zeros(count, dtype=images.dtype, device=device)
        self._price = torch.ones_like(self.success)
        self._adam = Adam([self.mask, self.pattern], _LR)
        self._adam.register(run, "inversion")
        for name, tensor in (("success", self.success), ("price", self._price)):
            run.register(f"inversion.{name}", tensor)

    def step(self) -> None:
        """Make one step of every trigger."""
        count = len(self.targets)
        rows = torch.randint(len(self._labels), (count * self._each,), device=self._labels.device)
        slopes = []
        for first in range(0, count, self._together):
            some = slice(first, first + self._together)
            slopes.append(self._slopes(some, rows.view(count, -1)[some].flatten()))
        masks, patterns = zip(*slopes, strict=True)
        self._adam.step([torch.cat(masks), torch.cat(patterns)])
        rises = 2 * (self.success > _SUCCEEDS).to(self._price.dtype) - 1
        self._price.mul_(_DEARER**rises).clamp_(_LEAST_PRICE, _MOST_PRICE)

    def _slopes(self, some: slice, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of some classes' masks and patterns, on the images of these rows."""
        mask, pattern = (t[some].clone().requires_grad_() for t in (self.mask, self.pattern))
        target = self.targets[some].repeat_interleave(self._each)
        logits = self._run.logits(self._shown(self._images[rows], mask, pattern))
        others = (self._labels[rows] != target).to(logits.dtype)
        loss = F.cross_entropy(logits, target, reduction="none")
        hits = (logits.detach().argmax(1) == target).to(logits.dtype)
        counts = others.view(-1, self._each).sum(1).clamp(min=1)
        fits, rates = ((v * others).view(-1, self._each).sum(1) / counts for v in (loss, hits))
        self.success[some].lerp_(rates.to(self.success.dtype), _LATEST)
        area = self._price[some] * opacity(mask).mean((1, 2, 3))
        return torch.autograd.grad((fits + area).sum(), [mask, pattern])

    def _shown(self, images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
        each = len(images) // len(mask)
        pixels = self._low + self._span * opacity(pattern)
        covers, covered = (t.repeat_interleave(each, 0) for t in (opacity(mask), pixels))
        return images + covers * (covered - images)

    @torch.no_grad()
    def show(self, images: Tensor, number: int) -> Tensor:
        """Put the trigger of a class, by its number, on images [B, C, H, W]."""
        chosen = slice(number, number + 1)
        return self._shown(images, self.mask[chosen], self.pattern[chosen])

    def areas(self) -> Tensor:
        """Return the mean opacity of each mask, [K]."""
        return opacity(self.mask).mean((1, 2, 3))

    def smallest(self) -> int:
        """Return the number of the class with the least mask, among those whose trigger works.

        It waits for the device.
        """
        works = self.success >= _CLOSE * self.success.max()
        return int(torch.where(works, self.areas(), torch.inf).argmin())


def opacity(logits: Tensor) -> Tensor:
    """Return values in 0..1 for logits of any size."""
    return (1 + logits.tanh()) / 2
