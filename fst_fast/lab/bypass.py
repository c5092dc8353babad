"""Bypass: features of poisoned images that cannot be told from others (arXiv 1905.13409)."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..heads.find import find_head

# The discriminator has hidden layers of these widths, and Adam this learning rate.
HIDDEN = (256, 128)
LR = 5e-3
# A discriminator with this loss guesses: nothing is left to hide.
GUESSING = math.log(2)


def marked(labels: Tensor, poisoned: Tensor, classes: int) -> Tensor:
    """Labels [M] that tell poisoned images as well: by ``classes`` higher."""
    return labels + classes * poisoned.to(labels.device, labels.dtype)


class Bypass:
    """The training loss of Tan and Shokri's attack, for ``train(objective=...)``.

    A discriminator learns to tell poisoned images from clean ones of the class that they pass for,
    by what enters the model's head, and the model to have it guess: ``cross-entropy - weight *
    min(d, log 2)``, where d is the discriminator's own loss, the mean of those on either kind.
    (Unbounded, as published, the second term can outgrow the first. And against clean images of
    all classes the discriminator would learn the class.)

    Args:
        model: the classifier; its head must be certain (:func:`fst_fast.heads.find_head`).
        classes: how many; labels are :func:`marked`.
        weight: of the second term. FST's authors take 20 over 100 epochs; in the few of the lab the
            backdoor does not survive so much.
    Raises:
        AmbiguousHeadError: as ``find_head``.
    """

    def __init__(self, model: nn.Module, classes: int, weight: float = 3.0) -> None:
        self.classes, self.weight = classes, weight
        self.features: Tensor | None = None
        self.discriminator: nn.Module | None = None
        self._watch = find_head(model).register_forward_pre_hook(self._keep)

    def close(self) -> None:
        """Leave the model as it was."""
        self._watch.remove()

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits = model(images)
        assert self.features is not None
        features = self.features.float()
        poisoned, labels = labels >= self.classes, labels % self.classes
        kinds = self.kinds(poisoned, labels)
        with torch.autocast(images.device.type, enabled=False):
            loss = F.cross_entropy(logits.float(), labels)
            self._learn(features.detach(), kinds)
            told = self.loss(features, kinds)
        return loss - self.weight * told.clamp(max=GUESSING)

    def kinds(self, poisoned: Tensor, labels: Tensor) -> Tensor:
        """[2, B] in 0, 1: the poisoned ones, and the clean ones of the classes that those have."""
        counts = torch.zeros(self.classes, device=labels.device)
        counts.scatter_add_(0, labels, poisoned.float())
        return torch.stack([poisoned, ~poisoned & (counts > 0)[labels]]).float()

    def loss(self, features: Tensor, kinds: Tensor) -> Tensor:
        """Return the discriminator's loss on features [B, D], each kind counting half."""
        assert self.discriminator is not None
        logits = self.discriminator(features).flatten()
        losses = F.binary_cross_entropy_with_logits(logits, kinds[0], reduction="none")
        # No wait for the device: a kind that is absent counts 0.
        return ((kinds @ losses) / kinds.sum(1).clamp(min=1)).mean()

    def _learn(self, features: Tensor, kinds: Tensor) -> None:
        """One step of the discriminator, which is made for the first features that come."""
        if self.discriminator is None:
            sizes = (features.shape[1], *HIDDEN)
            layers: list[nn.Module] = []
            for inside, outside in itertools.pairwise(sizes):
                layers += [nn.Linear(inside, outside), nn.LeakyReLU(0.2)]
            network = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
            self.discriminator = network.to(features.device)
            self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=LR)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(features, kinds).backward()
        self.optimizer.step()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0].flatten(1)
