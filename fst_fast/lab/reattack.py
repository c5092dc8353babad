"""Attacks on purified models (Min et al., arXiv 2410.09838): does the backdoor come back?

Success after these says how deep a purification went: a low attack success alone may be a door
that is closed and not gone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.augment import Augment
from ..data.batches import autocast, resolve_device, resolve_precision, safe_layout
from ..data.device_loader import DeviceLoader
from ..data.image_sets import ImageSet
from ..heads.contexts import evaluating, seeded
from ..heads.find import logits_of
from ..measure.fold_batchnorm import folded
from ..triggers import Trigger
from ..triggers.pixels import Normalization, normalize_affine, normalize_bytes

# The attack by queries changes a pixel by at most this, in units of 0..1, and gives the divergence
# this weight.
BOUND = 16 / 255
DIVERGENCE = 0.2


def retune(
    model: nn.Module,
    clean: ImageSet,
    trigger: Trigger,
    target: int = 0,
    *,
    normalize: Normalization | None,
    poisoned: int = 5,
    epochs: int = 5,
    lr: float = 0.01,
    momentum: float = 0.9,
    batch_size: int = 128,
    augment: Augment | str | None = "cifar",
    seed: int = 42,
    device: torch.device | str | None = None,
    precision: str = "auto",
) -> nn.Module:
    """The retuning attack (RA): fine-tune on clean images of which a few carry the trigger.

    Args:
        model: a purified model; left as it is.
        clean: what the attacker tunes on; the paper takes 2 % of the training set.
        trigger, target: the backdoor to be woken.
        normalize: (mean, std) that the model was trained with.
        poisoned: images that get the trigger and the target as their label, of other classes.
        epochs, lr, momentum, batch_size: of SGD at a constant rate; the defaults are the paper's.
        augment: of the images, the poisoned ones after their trigger.
        seed: of the choice and the batches.
    Returns:
        The tuned copy, in eval mode.
    Raises:
        ValueError: fewer images of other classes than ``poisoned``.

    Example:
        >>> from fst_fast.data.image_sets import ImageSet
        >>> images = torch.zeros(8, 8, 8, 3, dtype=torch.uint8)
        >>> data = ImageSet(images, torch.arange(8) % 2, ("cat", "dog"))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        >>> trigger = fst_fast.triggers.BadNets()
        >>> tuned = fst_fast.lab.retune(model, data, trigger, normalize=None, poisoned=2, epochs=1)
        >>> tuned is model
        False
    """
    others = int((clean.labels != target).sum())
    if not 1 <= poisoned <= others:
        raise ValueError(
            f"retune: poisoned must be in 1..{others}, the clean images of other classes than "
            f"{target}, got {poisoned}; the paper's is 5"
        )
    place = resolve_device(device, model)
    kind = resolve_precision(precision, place)
    tuned = copy.deepcopy(model).to(place).requires_grad_(True).train()
    mask = torch.zeros(len(clean), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    candidates = (clean.labels != target).nonzero().flatten()
    mask[candidates[torch.randperm(len(candidates), generator=generator)[:poisoned]]] = True
    loader = DeviceLoader(
        clean.images,
        clean.labels,
        batch_size,
        device=place,
        seed=seed,
        augment=augment,
        normalize=normalize,
        trigger=trigger,
        poisoned=mask,
        target=target,
        channels_last=safe_layout(tuned, place) == torch.channels_last,
    )
    optimizer = torch.optim.SGD(tuned.parameters(), lr=lr, momentum=momentum)
    with seeded(seed, place):
        for _ in range(epochs):
            for images, labels in loader:
                with autocast(place, kind):
                    logits = logits_of(tuned(images)).flatten(1)
                loss = F.cross_entropy(logits.float(), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
    tuned.zero_grad(set_to_none=True)
    return tuned.eval()


@dataclass(frozen=True)
class Reactivation:
    """The result of :func:`reactivate`.

    Attributes:
        success: share of test images of other classes that the purified model, shown them with the
            trigger and the perturbation, takes for the target.
        clean_success: the same with the perturbation alone.
        transfer: share of clean test images that the clean model still gets right when perturbed.
        perturb: the network that makes the perturbation, [B, C, H, W] in 0..1 to the same.
    """

    success: float
    clean_success: float
    transfer: float
    perturb: nn.Module

    def rates(self) -> dict[str, float]:
        """All but the network."""
        names = ("success", "clean_success", "transfer")
        return {name: getattr(self, name) for name in names}


class Perturbation(nn.Module):
    """The four-layer perceptron of the attack: ``x + 16/255 * tanh(MLP(x))``, clipped to 0..1."""

    def __init__(self, elements: int, width: int = 1024) -> None:
        super().__init__()
        sizes = [elements, width, width, width, elements]
        layers: list[nn.Module] = []
        for inside, outside in itertools.pairwise(sizes):
            layers += [nn.Linear(inside, outside), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        change = self.layers(x.flatten(1)).tanh().view_as(x)
        return (x + BOUND * change).clamp(0, 1)


def reactivate(
    purified: nn.Module,
    retuned: nn.Module,
    clean_model: nn.Module,
    known: ImageSet,
    test: ImageSet,
    trigger: Trigger,
    target: int = 0,
    *,
    normalize: Normalization | None,
    images: int = 500,
    epochs: int = 50,
    lr: float = 0.1,
    momentum: float = 0.9,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    precision: str = "auto",
    on_epoch: Callable[[int, float], None] | None = None,
) -> Reactivation:
    """The query-based reactivation attack (QRA): learn a perturbation that wakes the backdoor.

    Minimises ``CE(clean_model(p(x)), y) + 0.2 * KL(retuned(x) || purified(p(x)))`` over the
    perturbation p, on images with and without the trigger, y being their true label: the purified
    model must answer as the retuned one does, while to a model without a backdoor nothing changes.

    Args:
        purified: the model under attack.
        retuned: what :func:`retune` made of it.
        clean_model: one that was never backdoored, for the same task.
        known: images the attacker has; ``images`` of them as they are and as many with the trigger.
        test: images that the success is measured on.
        normalize: (mean, std) that all three models were trained with.
        images, epochs, lr, momentum, batch_size: the defaults are the paper's.
        seed: of the perturbation's weights, the choice and the batches.
        precision: of the three models; the perturbation is float32.
        on_epoch: called after each epoch with its number (from 1) and mean loss.
    Raises:
        ValueError: fewer images than asked for, or no test image of another class.

    Example:
        >>> from fst_fast.data.image_sets import ImageSet
        >>> images = torch.zeros(8, 8, 8, 3, dtype=torch.uint8)
        >>> data = ImageSet(images, torch.arange(8) % 2, ("cat", "dog"))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        >>> found = fst_fast.lab.reactivate(
        ...     model,
        ...     model,
        ...     model,
        ...     data,
        ...     data,
        ...     fst_fast.triggers.BadNets(),
        ...     normalize=None,
        ...     images=4,
        ...     epochs=1,
        ... )
        >>> sorted(found.rates())
        ['clean_success', 'success', 'transfer']
    """
    if not 1 <= images <= len(known):
        raise ValueError(
            f"reactivate: images must be in 1..{len(known)}, as many as known holds, got {images}; "
            "the paper's is 500"
        )
    others = test.labels != target
    if not bool(others.any()):
        raise ValueError(
            f"reactivate: test must hold images of other classes than {target}, got none; "
            "check the label mapping"
        )
    place = resolve_device(device, purified)
    models = (purified, retuned, clean_model)
    kind = resolve_precision(precision, place)
    with ExitStack() as stack:
        stack.enter_context(seeded(seed, place))
        for model in models:
            stack.enter_context(evaluating(model, place))
        chosen = known.subset(torch.randperm(len(known))[:images])
        inputs = torch.cat([chosen.images, trigger.apply(chosen.images)])
        network = _Networks(models, place, kind, normalize, inputs[:2])
        labels = chosen.labels.repeat(2).to(place)
        wanted = network.outputs(network.retuned, inputs).log_softmax(1)
        perturb = Perturbation(inputs[0].numel()).to(place)
        optimizer = torch.optim.SGD(perturb.parameters(), lr=lr, momentum=momentum)
        places = torch.arange(len(inputs))
        loader = DeviceLoader(inputs, places, batch_size, device=place, seed=seed)
        for epoch in range(epochs):
            total = torch.zeros((), device=place)
            for x, at in loader:
                loss = network.loss(perturb(x), labels[at], wanted[at])
                optimizer.zero_grad(set_to_none=True)
                # The three models' own parameters need no gradients.
                loss.backward(inputs=list(perturb.parameters()))
                optimizer.step()
                total += loss.detach() * len(x)
            if on_epoch is not None:
                on_epoch(epoch + 1, (total / len(inputs)).item())
        perturb.eval().requires_grad_(False)
        shown = test.subset(others)
        triggered = network.answers(network.purified, trigger.apply(shown.images), perturb)
        plain = network.answers(network.purified, shown.images, perturb)
        unharmed = network.answers(network.clean, test.images, perturb)
    return Reactivation(
        success=(triggered == target).float().mean().item(),
        clean_success=(plain == target).float().mean().item(),
        transfer=(unharmed == test.labels).float().mean().item(),
        perturb=perturb.cpu(),
    )


class _Networks:
    """The three fixed models, on the device and in eval mode, shown pixels in 0..1."""

    def __init__(
        self,
        models: tuple[nn.Module, nn.Module, nn.Module],
        device: torch.device,
        precision: str,
        normalize: Normalization | None,
        few: Tensor,
    ) -> None:
        self.device, self.precision = device, precision
        self.scale, self.shift = (t.to(device) for t in normalize_affine(few.shape[-1], normalize))
        layouts = {safe_layout(model, device) for model in models}
        self.layout = layouts.pop() if len(layouts) == 1 else torch.contiguous_format
        images = self.normalized(self.pixels(few))
        self.purified, self.retuned, self.clean = (folded(model, images) for model in models)

    def pixels(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in 0..1 on the device, of stored images."""
        return normalize_bytes(images.to(self.device), None)

    def normalized(self, pixels: Tensor) -> Tensor:
        return (pixels * self.scale + self.shift).contiguous(memory_format=self.layout)

    def logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            logits = logits_of(model(self.normalized(pixels)))
        return logits.float().flatten(1)

    def loss(self, changed: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
        """Return the loss of perturbed pixels; ``wanted``: the retuned log-probabilities."""
        got = self.logits(self.purified, changed).log_softmax(1)
        divergence = F.kl_div(got, wanted, reduction="batchmean", log_target=True)
        unharmed = F.cross_entropy(self.logits(self.clean, changed), labels)
        return unharmed + DIVERGENCE * divergence

    @torch.no_grad()
    def outputs(self, model: nn.Module, images: Tensor, perturb: nn.Module | None = None) -> Tensor:
        """Logits of stored images, perturbed if asked, [N, K] float32 on the device."""
        change = nn.Identity() if perturb is None else perturb
        parts = images.split(500)
        return torch.cat([self.logits(model, change(self.pixels(part))) for part in parts])

    def answers(self, model: nn.Module, images: Tensor, perturb: nn.Module) -> Tensor:
        """Predicted classes of perturbed stored images, [N] int64 on the CPU."""
        return self.outputs(model, images, perturb).argmax(1).cpu()
