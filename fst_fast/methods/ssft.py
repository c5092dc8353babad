"""Shortcut suppression and fine-tuning (SSFT; Yang et al., ICASSP 2023, arXiv 2211.05631)."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import triggers
from .base import Method, Run
from .checks import check_counts, check_numbers
from .shortcuts import Shortcut, find_shortcuts, scale, successes
from .tuned_copy import TunedCopy

# So many clean images are kept, in so many bytes; a step of the probe takes a batch, and so many
# images measure an attack.
_IMAGES, _IMAGE_BYTES, _BATCH, _MEASURED = 1024, 256 * 2**20, 128, 256
# The probe backdoor is learnt with this rate, on so many of a batch's images.
_LR, _POISONED = 0.01, 0.25
_PROBE = "badnets"
# A shortcut is scanned by these factors, from suppressed to whole.
FACTORS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class SSFT(Method):
    """Suppress the residual shortcut that a backdoor goes by, and tune its stage.

    A shortcut s(x) of a block F(x) + s(x) is multiplied by ``kept``, and the layers of its stage
    are tuned to do without; everything else stands still, but for batch norm's statistics. Of
    shortcuts scanned with factors g = 0, 0.1, ..., 1, the one with the greatest
    ``(success(g) - success(g - 0.1)) / exp(success(g - 0.1))`` of the attack is chosen. That takes
    a trigger. With ``trigger``, the attack is measured on the suspect. Without one, a copy of the
    suspect first learns a probe backdoor of our own, a small patch that is to be class ``target``,
    and the scan is made there: the authors' code chooses on a model with another attack as well.

    The shortcuts are found by what the model computes: of two branches from one place that are
    added, the one with fewer layers. The stage are the layers whose results have the sum's height
    and width, which is our choice, as no name tells it. The authors suppress with a hook, which
    their model then needs for good. Here the factor is multiplied into the weight and bias of the
    layer that ends the shortcut, so that the result stays a plain model that computes the same. An
    identity has no such layer: it cannot be suppressed in a plain model and is never chosen. A
    model whose shortcuts are all identities is refused rather than tuned with a suppression that
    ends with the tuning. In a CIFAR ResNet-18, the shortcuts at the start of stages 2 to 4 count;
    the one that the authors name, ``layer3.1.shortcut``, is an identity. Other choices of ours: the
    scan's first factor has no score, and weight decay (5e-4) is left out. They tune for 10 epochs.

    Args:
        kept: factor of the chosen shortcut, in 0..1.
        shortcut: its number among those that can be suppressed, from 0; None chooses.
        trigger: name in ``fst_fast.triggers.ZOO`` of the suspect's attack, if it is known.
        trigger_options: of it, a mapping.
        target: the class of the attack, or of the probe.
        probe_steps: in which the probe backdoor is learnt.

    Example:
        >>> fst_fast.methods.get("ssft", trigger="badnets", trigger_options={"size": 3}).trigger
        'badnets'
    """

    name: ClassVar[str] = "ssft"
    cost: ClassVar[str] = "at most 1"
    data_parallel: ClassVar[bool] = False
    needs: ClassVar[str] = "a residual shortcut that ends in a layer"

    kept: float = 0.0
    shortcut: int | None = None
    trigger: str | None = None
    trigger_options: Mapping[str, Any] | Sequence[Sequence[Any]] = ()
    target: int = 0
    probe_steps: int = 60

    def __post_init__(self) -> None:
        check_numbers(self, kept=(0, 1))
        check_counts(self, target=0, probe_steps=0)
        if self.shortcut is not None:
            check_counts(self, shortcut=0)
        options: dict[str, Any] = dict(self.trigger_options)  # type: ignore[arg-type]
        object.__setattr__(self, "trigger_options", tuple(sorted(options.items())))
        if self.trigger is None and options:
            raise ValueError(
                f"ssft: trigger must be given with its trigger_options, got {options} alone; name "
                "one or leave them out"
            )
        self._attack()

    def _attack(self) -> triggers.Trigger:
        options: dict[str, Any] = dict(self.trigger_options)  # type: ignore[arg-type]
        return triggers.get(self.trigger or _PROBE, **options)

    def begin(self, run: Run) -> None:
        run.model.eval()
        images, labels = run.sample(_IMAGES, _IMAGE_BYTES)
        found = suppressible(run.model, images[:2])
        if self.shortcut is not None and self.shortcut >= len(found):
            raise ValueError(
                f"ssft: shortcut must be a number in 0..{len(found) - 1}, got {self.shortcut}; "
                f"the model has {len(found)} that can be suppressed"
            )
        if self.target >= run.classes:
            raise ValueError(
                f"ssft: target must be a class of the model, 0 to {run.classes - 1}, got "
                f"{self.target}"
            )
        run.memo["shortcuts"] = found
        run.memo["chosen"] = torch.zeros((), dtype=torch.int64, device=labels.device)
        run.register("chosen", run.memo["chosen"])
        if self.shortcut is None:
            probe = _Probe(run, images, labels, self._attack(), self.target)
            run.memo["probe"] = probe

    def begin_epoch(self, run: Run, epoch: int) -> None:
        found: list[Shortcut] = run.memo["shortcuts"]
        if epoch == 0 and not run.goes_on_within:
            number = self._choice(run) if self.shortcut is None else self.shortcut
            run.memo["chosen"].fill_(number)
            scale(found[number].end, self.kept)
        chosen = found[int(run.memo["chosen"])]
        run.model.requires_grad_(False)
        for parameter in chosen.stage:
            parameter.requires_grad_()
        for parameter in chosen.end:
            parameter.requires_grad_(False)

    def _choice(self, run: Run) -> int:
        """Return the number of the shortcut whose factor the attack depends on most."""
        probe: _Probe = run.memo["probe"]
        if self.trigger is None:
            run.repeat("implant", probe.implant, self.probe_steps)
        probe.model.eval()
        ends = [one.end for one in suppressible(probe.model, probe.images[:2])]
        scores = [steepest(successes(end, FACTORS, probe.success)) for end in ends]
        return max(range(len(scores)), key=scores.__getitem__)


def suppressible(model: nn.Module, images: Tensor) -> list[Shortcut]:
    """Return the shortcuts of a model that end in a layer of their own.

    Raises:
        ValueError: there is none.
    """
    found = find_shortcuts(model, images)
    if not any(one.end for one in found):
        got = f"{len(found)}, all of them identities" if found else "none"
        raise ValueError(
            "ssft: model must have a residual shortcut that ends in a layer with a weight, such as "
            f"a convolution or a batch norm, as no plain model can suppress another, got {got} in "
            f"{type(model).__name__}; use d3, ft_sam, pam or trigger_unlearning, which tune any "
            "classifier"
        )
    return [one for one in found if one.end]


def steepest(rates: Sequence[float]) -> float:
    """Return the score of a shortcut from an attack's success under rising factors."""
    pairs = itertools.pairwise(rates)
    return max((later - former) / math.exp(former) for former, later in pairs)


class _Probe:
    """A copy of the suspect, and images with and without a trigger.

    Attributes:
        model: the copy.
        images: [N, C, H, W], clean.
    """

    def __init__(
        self, run: Run, images: Tensor, labels: Tensor, attack: triggers.Trigger, target: int
    ) -> None:
        self._run, self.images, self._labels, self._target = run, images, labels, target
        self._triggered = with_trigger(images, *run.pixel_range(images), attack)
        self._copy = TunedCopy(run, "probe", _LR)
        self.model = self._copy.model

    def implant(self) -> None:
        """Make one step in which the copy learns the backdoor, beside its clean images."""
        size = min(_BATCH, len(self._labels))
        rows = torch.randint(len(self._labels), (size,), device=self._labels.device)
        poisoned = max(1, round(_POISONED * size))
        images = torch.cat([self._triggered[rows[:poisoned]], self.images[rows[poisoned:]]])
        labels = self._labels[rows].clone()
        labels[:poisoned] = self._target
        loss = F.cross_entropy(self._run.logits(images, self.model), labels)
        self._copy.descend(torch.autograd.grad(loss, self._copy.weights, materialize_grads=True))

    @torch.no_grad()
    def success(self) -> float:
        """Return the share of triggered images of other classes that are answered as the target."""
        others = self._triggered[self._labels != self._target]
        # A loader may sort its images by class.
        some = others[:: max(1, -(-len(others) // _MEASURED))]
        if not len(some):
            return 0.0
        answers = self._run.logits(some, self.model).argmax(1)
        return (answers == self._target).double().mean().item()


def with_trigger(images: Tensor, low: Tensor, high: Tensor, attack: triggers.Trigger) -> Tensor:
    """Return images [N, C, H, W] as the attack changes their bytes.

    Args:
        low, high: [1, C, 1, 1], what the bytes 0 and 255 are.
    """
    span = (high - low).clamp(min=1e-6)
    pixels = (255 * (images - low) / span).round().clamp(0, 255).to(torch.uint8)
    changed = attack.apply(pixels.permute(0, 2, 3, 1).contiguous().cpu())
    return (changed.to(images).permute(0, 3, 1, 2) / 255 * span + low).contiguous()
