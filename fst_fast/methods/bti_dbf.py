"""Backdoor inversion by decoupled features (BTI-DBF; Xu et al., ICLR 2024)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adam import Adam
from .base import Batch, Closure, Method, Run
from .checks import check_counts, check_numbers

# So many clean images are kept for the search, in so many bytes; a step of it takes a batch.
_IMAGES, _IMAGE_BYTES, _BATCH = 1024, 256 * 2**20, 128
# Beyond these distances, in the squares of normalised pixels and features, the generator only
# comes back to the image.
_IMAGE_REACH, _FEATURE_REACH = 0.3, 3.0
_BENIGN_WEIGHT, _NOISE, _CHANNELS = 0.01, 0.03, 32


@dataclass(frozen=True)
class BTIDBF(Method):
    """Find the features that clean answers need, invert the trigger by the others, unlearn it.

    With features phi below the head g, a round has three parts. First a mask ``m`` in 0..1 of the
    features minimises ``CE(g(m phi)) - CE(g((1 - m) phi))`` on the model as it is. Then a generator
    G minimises ``0.01 MSE(m phi) - MSE((1 - m) phi)`` between an image and ``G(image)``: it changes
    what clean answers do not need. Where it strays too far, it comes back by the images' MSE; from
    the second round on, it also aims at the class that most of its images are given. Then the model
    is tuned on batches of which a ``share`` is changed by G, with true labels, and
    ``MSE(phi(image), phi(G(image)))`` is added to the cross-entropy.

    This is our reconstruction of the variant that unlearns. As in the authors' code are the losses,
    their weights, ``share`` and the five rounds. Ours are: phi is the head's input, where they take
    the map before pooling; G adds a small convolutional network and a pattern to the image, where
    they train a U-Net to be the identity first; the loop's SGD tunes the model, not Adam at 1e-4;
    a round has a quarter of their steps, and the mask four times their learning rate of 0.01.

    Args:
        share: of each batch that is changed.
        rounds: at most as many as the run has epochs.
        mask_steps, mask_lr: of the mask, by Adam, in every round.
        invert_steps, invert_lr: of the generator, by Adam, in every round.

    Example:
        >>> fst_fast.methods.get("bti_dbf", rounds=2).rounds
        2
    """

    name: ClassVar[str] = "bti_dbf"
    cost: ClassVar[str] = "1.1, and the searches"
    # Its loss is one of features and logits.
    needs_logits: ClassVar[bool] = True

    share: float = 0.1
    rounds: int = 5
    mask_steps: int = 100
    mask_lr: float = 0.04
    invert_steps: int = 150
    invert_lr: float = 1e-3

    def __post_init__(self) -> None:
        check_numbers(self, share=(0, 1), mask_lr=(0, math.inf), invert_lr=(0, math.inf))
        check_counts(self, rounds=1, mask_steps=0, invert_steps=0)

    def begins_round(self, epoch: int, epochs: int) -> bool:
        """Return whether a round begins with this epoch, 0-based, of so many."""
        rounds = min(self.rounds, epochs)
        return epoch == 0 or epoch * rounds // epochs > (epoch - 1) * rounds // epochs

    def begin(self, run: Run) -> None:
        run.memo["inversion"] = Inversion(run, self.mask_lr, self.invert_lr)

    def begin_epoch(self, run: Run, epoch: int) -> None:
        if self.begins_round(epoch, run.epochs) and not run.goes_on_within:
            run.model.eval()
            run.memo["inversion"].round(self.mask_steps, self.invert_steps, first=epoch == 0)

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        labels, inversion = batch.labels, run.memo["inversion"]
        count = max(1, round(self.share * len(labels)))
        rows = torch.rand(len(labels), device=labels.device).argsort()[:count]
        originals = batch.inputs[rows]
        with torch.no_grad():
            changed = inversion.generator(originals)
        inputs = batch.inputs.index_copy(0, rows, changed)
        logits, found = logits_and_features(run, torch.cat([inputs, originals]))
        features, unchanged = found.split([len(labels), count])
        logits = logits[: len(labels)]
        # The images that stay as they are have no distance.
        apart = (features[rows] - unchanged).square().mean() * (count / len(labels))
        loss = F.cross_entropy(logits, labels) + apart
        run.model.zero_grad(set_to_none=True)
        (loss * run.loss_scale).backward()
        return loss.detach(), (logits.argmax(1) == labels).sum()


class Generator(nn.Module):
    """Adds to images [B, C, H, W] what a small network makes of them, and a pattern.

    Args:
        low, high: [1, C, 1, 1], the range of pixels.
    """

    def __init__(self, images: Tensor, low: Tensor, high: Tensor) -> None:
        super().__init__()
        channels = images.shape[1]
        layers = [
            nn.Conv2d(channels, _CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(_CHANNELS, channels, 3, padding=1),
        ]
        # It starts near the image, and not at it, where all distances have a gradient of zero.
        with torch.no_grad():
            layers[-1].weight.mul_(0.1)  # type: ignore[operator]
        self.net = nn.Sequential(*layers)
        self.pattern = nn.Parameter(torch.zeros(images.shape[1:]))
        self.to(images.device, images.dtype)
        self.low, self.high = low, high

    def forward(self, images: Tensor) -> Tensor:
        return (images + self.net(images) + self.pattern).clamp(self.low, self.high)


class Inversion:
    """The mask and the generator of a run.

    Attributes:
        mask_logits: of the shape of an image's features; the mask is (1 + tanh) / 2 of them.
        target: 0-d, the class that the generator's images are given.
    """

    def __init__(self, run: Run, mask_lr: float, invert_lr: float) -> None:
        self._run = run
        self.images, self.labels = run.sample(_IMAGES, _IMAGE_BYTES)
        self.generator = Generator(self.images, *run.pixel_range(self.images))
        features = self._features(self.images[:2])[1]
        self.mask_logits = torch.zeros_like(features[0])
        self.target = torch.zeros((), dtype=torch.int64, device=self.labels.device)
        self._aims = torch.zeros((), device=self.labels.device)
        self._weights: list[Tensor] = list(self.generator.parameters())
        self._mask_adam = Adam([self.mask_logits], mask_lr)
        self._invert_adam = Adam([w.detach() for w in self._weights], invert_lr)
        self._mask_adam.register(run, "mask")
        self._invert_adam.register(run, "generator")
        run.register("target", self.target)
        run.register("aims", self._aims)

    def _features(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return logits_and_features(self._run, images, mask)

    def _batch(self) -> tuple[Tensor, Tensor]:
        size = min(_BATCH, len(self.labels))
        rows = torch.randint(len(self.labels), (size,), device=self.labels.device)
        return self.images[rows], self.labels[rows]

    @torch.no_grad()
    def round(self, mask_steps: int, invert_steps: int, first: bool) -> None:
        """Decouple the features of the model as it is, and invert on."""
        self.mask_logits.zero_()
        for adam in (self._mask_adam, self._invert_adam):
            adam.reset()
        if not first:
            self._aims.fill_(1)
            noisy = self.images[:_BATCH] + _NOISE * torch.randn_like(self.images[:_BATCH])
            answers = self._run.logits(self.generator(noisy)).argmax(1)
            self.target.copy_(answers.mode().values)
        with torch.enable_grad():
            self._run.repeat("decouple", self.decouple, mask_steps)
            self._run.repeat("invert", self.invert, invert_steps)

    def decouple(self) -> None:
        """Make one step of the mask."""
        images, labels = self._batch()
        moved = self.mask_logits.clone().requires_grad_()
        mask = (1 + moved.tanh()) / 2
        kept, left = (self._features(images, m)[0] for m in (mask, 1 - mask))
        loss = F.cross_entropy(kept, labels) - F.cross_entropy(left, labels)
        self._mask_adam.step(torch.autograd.grad(loss, [moved]))

    def invert(self) -> None:
        """Make one step of the generator."""
        images, _ = self._batch()
        mask = (1 + self.mask_logits.tanh()) / 2
        with torch.no_grad():
            before = self._features(images)[1]
        changed = self.generator(images)
        logits, after = self._features(changed)
        image = F.mse_loss(changed, images)
        benign = (mask * (after - before)).square().mean()
        other = ((1 - mask) * (after - before)).square().mean()
        aim = F.cross_entropy(logits, self.target.expand(len(images)))
        inverts = _BENIGN_WEIGHT * benign - other + self._aims * aim
        strays = (image > _IMAGE_REACH) | (benign > _FEATURE_REACH)
        loss = torch.where(strays, image, inverts)
        self._invert_adam.step(torch.autograd.grad(loss, self._weights))


def logits_and_features(
    run: Run, images: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return logits and features of images; the head gets the latter times the mask."""
    shape: list[int] = []

    def both(part: Tensor, *masks: Tensor) -> Tensor:
        change = (lambda features: features * masks[0]) if masks else None
        with head_inputs(run.head.module, change) as seen:
            logits = run.logits(part)
        shape[:] = seen[0].shape[1:]
        return torch.cat([logits, seen[0].to(logits.dtype).flatten(1)], 1)

    found = run.on_rows(both, images, *([] if mask is None else [mask]))
    logits, features = found.tensor_split([run.classes], 1)
    return logits, features.unflatten(1, shape)


@contextmanager
def head_inputs(
    head: nn.Module, change: Callable[[Tensor], Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """Yield a list that gets what the head is given within; ``change`` is applied to it first."""
    seen: list[Tensor] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        seen.append(given[0])
        return None if change is None else (change(given[0]), *given[1:])

    handle = head.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()
