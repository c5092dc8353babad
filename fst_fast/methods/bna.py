"""Activation-distribution correction (BNA; arXiv 2308.09850, Neurocomputing 614, 2025)."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..heads.output import logits_of
from .accuracy_limit import largest_allowed
from .base import Batch, Closure, Method, Run
from .checks import check_counts, check_numbers
from .inversion import MaskInversion
from .norms import INSTEAD
from .statistics_shift import StatisticsShift

# So many clean images are kept for the search, in so many bytes; so many measure activations.
_IMAGES, _IMAGE_BYTES, _MEASURED = 1024, 256 * 2**20, 256
# Such shares of the correction are tried, the smallest first.
SHARES = tuple(step / 10 for step in range(1, 11))


@dataclass(frozen=True)
class BNA(Method):
    """Find a trigger, and set the statistics of batch norm to those of images that carry it.

    A trigger shifts the distribution of activations. Batch norm subtracts a mean and divides by a
    deviation of each channel; with the moments of triggered activations in their place, what such
    an image makes of the next layer is distributed as a clean image's. No weight is trained.

    The text and the code of the paper were not to be had: this is our reconstruction from its
    abstract. First a trigger behind a mask is inverted for every class, by ``search_steps`` steps;
    the class with the smallest mask is the target. Then batch norms are corrected one after the
    other, each on what the corrected ones before it give. With mean m and variance v as they are,
    clean moments (mu, var) and triggered ones (mu', var'), a ``share`` s sets the mean to
    ``m + s (mu' - mu)`` and the variance to
    ``v ((1 - s) + s var' / var + s (1 - s) (mu' - mu)^2 / var)``: the moments of a stream of which
    the share s carries the trigger. The paper may bound activations by their clean quantiles, too;
    this is left out, as no layer of the model could hold the bounds.

    The paper corrects an image only where the suspect answers the target class; that takes two
    models. With ``share=1.0``, the result is the corrected one, and :func:`detect_triggered` asks
    both. A plain model that is to serve alone must do well on clean images, too: without a
    ``share``, it is the largest one, in steps of 0.1, that costs at most ``most_lost`` of the
    accuracy on clean images: those of ``validation``, else those of the loader. One pass over the
    loader measures it, whatever ``epochs`` asks for.

    Args:
        search_steps: of the inversion.
        search_images: of each class in a step of it.
        target: the class, where it is known, which spares the others' inversion.
        share: of the correction; None chooses.
        most_lost: accuracy that the correction may cost, in 0..1.

    Example:
        >>> fst_fast.methods.get("bna", share=1.0).share
        1.0
    """

    name: ClassVar[str] = "bna"
    cost: ClassVar[str] = "none, but the search"
    data_parallel: ClassVar[bool] = False
    needs: ClassVar[str] = "batch norm with running statistics"
    needs_logits: ClassVar[bool] = True

    search_steps: int = 200
    search_images: int = 8
    target: int | None = None
    share: float | None = None
    most_lost: float = 0.05

    def __post_init__(self) -> None:
        check_counts(self, search_steps=1, search_images=1)
        check_numbers(self, most_lost=(0, 1))
        if self.share is not None:
            check_numbers(self, share=(0, 1))
        if self.target is not None:
            check_counts(self, target=0)

    def begin(self, run: Run) -> None:
        norms = [m for m in run.model.modules() if isinstance(m, _BatchNorm)]
        norms = [norm for norm in norms if norm.running_mean is not None]
        if not norms:
            raise ValueError(
                f"{self.name}: model must have batch norm with running statistics, got "
                f"{type(run.model).__name__} without any; {INSTEAD}"
            )
        if self.target is not None and self.target >= run.classes:
            raise ValueError(
                f"{self.name}: target must be a class of the model, 0 to {run.classes - 1}, got "
                f"{self.target}; leave it out to search"
            )
        images, labels = run.sample(_IMAGES, _IMAGE_BYTES)
        if bool((labels == labels[0]).all()):
            raise ValueError(
                f"{self.name}: loader must have images of two classes or more, got class "
                f"{labels[0].item()} alone; give it images of the others as well"
            )
        classes = range(run.classes) if self.target is None else [self.target]
        run.memo["images"], run.memo["labels"], run.memo["norms"] = images, labels, norms
        run.memo["inversion"] = MaskInversion(
            run, images, labels, *run.pixel_range(images), classes, self.search_images
        )
        run.memo["found"] = torch.zeros(3, dtype=torch.float64, device=labels.device)
        run.register("found", run.memo["found"])
        run.model.requires_grad_(False)
        run.epochs = 1

    def begin_epoch(self, run: Run, epoch: int) -> None:
        if run.goes_on_within:
            return
        inversion: MaskInversion = run.memo["inversion"]
        run.model.eval()
        run.repeat("invert", inversion.step, self.search_steps)
        number = inversion.smallest()
        before = self._success(run, number)
        carriers = self._spread_over(run.memo["images"][self._others(run, number)])
        shift = StatisticsShift(
            *(run.memo["norms"], run.logits, self._spread_over(run.memo["images"])),
            inversion.show(carriers, number),
        )
        if self.share is None:
            share = largest_allowed(run, 0.0, SHARES, shift.put, self.most_lost)
        else:
            share = self.share
            shift.put(share)
        run.memo["found"].copy_(torch.tensor([number, share, before]))

    def _others(self, run: Run, number: int) -> Tensor:
        """Return which images are of other classes than this trigger's."""
        others: Tensor = run.memo["labels"] != run.memo["inversion"].targets[number]
        return others

    @staticmethod
    def _spread_over(images: Tensor) -> Tensor:
        """Return a few of the images, in even steps, as a loader may sort them by class."""
        return images[:: -(-len(images) // _MEASURED)]

    @torch.no_grad()
    def _success(self, run: Run, number: int) -> float:
        """Return the share of images of other classes that the trigger makes the target."""
        inversion: MaskInversion = run.memo["inversion"]
        images = self._spread_over(run.memo["images"][self._others(run, number)])
        answers = run.logits(inversion.show(images, number)).argmax(1)
        return (answers == inversion.targets[number]).double().mean().item()

    @torch.no_grad()
    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        run.model.eval()
        logits = run.logits(batch.inputs)
        run.model.train()
        return F.cross_entropy(logits, batch.labels), (logits.argmax(1) == batch.labels).sum()

    def finish(self, run: Run) -> None:
        run.model.eval()
        inversion: MaskInversion = run.memo["inversion"]
        number, share, before = run.memo["found"].tolist()
        found = {
            "form": "mask",
            "target": int(inversion.targets[int(number)]),
            "size": inversion.areas()[int(number)].item(),
            "before": before,
            "after": self._success(run, int(number)),
            "share": share,
        }
        run.findings.append(found)


class Detected(NamedTuple):
    """The answers behind a gate, and which images seem to carry a trigger.

    Attributes:
        labels: [B] int64: the corrected model's where the suspect answers the target, else the
            suspect's.
        triggered: [B] bool: the two models differ where the suspect answers the target.

    Example:
        >>> fst_fast.methods.Detected(torch.tensor([1]), torch.tensor([True])).labels
        tensor([1])
    """

    labels: Tensor
    triggered: Tensor


@torch.no_grad()
def detect_triggered(
    suspect: nn.Module, corrected: nn.Module, images: Tensor, target: int
) -> Detected:
    """Ask a suspect and its corrected twin, and tell which images seem to carry a trigger.

    Only where the suspect answers the target class does the corrected model count (BNA,
    arXiv 2308.09850, our reconstruction), so that clean images of other classes keep their answers.

    Args:
        suspect: the model as it came, in eval mode.
        corrected: what :func:`fst_fast.purify` made of it by ``bna`` with ``share=1.0``, in eval
            mode.
        images: [B, C, H, W] float, normalised as in training, where both models are.
        target: the attacker's class, which the result's ``findings`` tell.
    Returns:
        A :class:`Detected`, of [B] labels and [B] flags.
    Raises:
        ValueError: a model is in train mode, or there is no such class.

    Example:
        >>> suspect = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
        >>> images = torch.rand(4, 3, 2, 2)
        >>> fst_fast.methods.detect_triggered(suspect, suspect, images, target=0).triggered
        tensor([False, False, False, False])
    """
    for name, model in (("suspect", suspect), ("corrected", corrected)):
        if model.training:
            raise ValueError(
                f"detect_triggered: {name} must be in eval mode, got train mode, in which batch "
                f"norm takes the statistics of the images; call {name}.eval()"
            )
    logits = logits_of(suspect(images)).flatten(1)
    if not 0 <= target < logits.shape[1]:
        raise ValueError(
            f"detect_triggered: target must be a class of the model, 0 to {logits.shape[1] - 1}, "
            f"got {target!r}; the findings of purify's result tell it"
        )
    first, second = logits.argmax(1), logits_of(corrected(images)).flatten(1).argmax(1)
    gated = first == target
    return Detected(torch.where(gated, second, first), gated & (second != target))
