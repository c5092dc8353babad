"""A pool of universal triggers, searched against a model while the model learns to resist it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .trigger_forms import ANNEAL, Register, TriggerForm

# A trigger below this success has failed: the model resists it, or it never worked.
_FAILED = 0.2
# So has one far behind the best of its form.
_FAR_BEHIND = 0.5
# Triggers are drawn for a class by the evidence that it is a target and by how open it is, each to
# its power, and for a share evenly.
_BY_EVIDENCE, _EVIDENCE_POWER = 0.7, 2
_OPENNESS_POWER = 4
_EVENLY = 0.2
# The openness that is found of a class fades by epochs; that on the suspect never does.
_FADES, _FROM_SUSPECT = 0.9, 0.5
# Triggers are shown by their openness to this power, and a little more each.
_SHOWS, _AT_LEAST = 2, 0.05
# Forms are shown by their best openness on the suspect, to this power.
_FORM_POWER = 2
# If the best of all was this open, every image given carries a trigger; else fewer do, down to a
# share.
_OPEN, _LEAST_SHARE = 0.5, 0.25
# So many of the triggers that are shown are weakened, down to half.
_WEAKENED = 0.5


class TriggerPool:
    """Triggers of several forms for every class, and what earlier states of them were.

    Nothing in it waits for the device, so that a search step can be recorded as a CUDA graph.

    Args:
        forms: with the same count, shape and device.
        classes: of the model.
        ring: how many earlier states are kept, at least 2.
        at_once: images that the model takes in one batch, where a form's triggers allow it.
    Attributes:
        evidence: [K], that each class is the target; sums to 1, and is even until :meth:`aim`.
    """

    def __init__(
        self, forms: Sequence[TriggerForm], classes: int, ring: int, at_once: int = 512
    ) -> None:
        self.forms, self.classes, self.at_once = list(forms), classes, at_once
        self.count, self.device = forms[0].count, forms[0].device
        self.evidence = torch.full((classes,), 1 / classes, device=self.device)
        self._ring = ring
        # Each form notes how open it found each class lately, and on the suspect.
        self._open = torch.zeros(len(forms), classes, device=self.device)
        self._open_at_first = torch.zeros_like(self._open)
        # The weights of the forms in a draw, and the share of the images that carry a trigger.
        self._form_weights = torch.ones(len(forms), device=self.device)
        self._share = torch.ones((), device=self.device)
        self._earlier = [
            [p.repeat(ring, *[1] * (p.dim() - 1)) for p in form.parameters] for form in self.forms
        ]
        self._weights = torch.zeros(len(forms), ring * self.count, device=self.device)
        for form in self.forms:
            form.target.copy_(torch.arange(self.count, device=self.device) % classes)

    def register(self, register: Register) -> None:
        register("evidence", self.evidence)
        register("open", self._open)
        register("open_at_first", self._open_at_first)
        register("form_weights", self._form_weights)
        register("share", self._share)
        register("weights", self._weights)
        for form, earlier in zip(self.forms, self._earlier, strict=True):
            form.register(register)
            for number, tensor in enumerate(earlier):
                register(f"{form.name}.earlier.{number}", tensor)

    def search(
        self,
        logits_of: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        each: int,
        counts: bool = True,
    ) -> None:
        """Take one step of every trigger against the model.

        Minimises the cross-entropy of the model's answers to the trigger's class, on images of
        other classes. Forms share a batch as far as ``at_once`` allows.

        Args:
            logits_of: the model, for images [B, C, H, W] in 0..1; logits [B, K] float32.
            images: [N, C, H, W] in 0..1, to draw from.
            labels: [N] int64.
            each: images for each trigger.
            counts: whether the answers count towards the triggers' success.
        """
        rows = torch.randint(len(labels), (len(self.forms), self.count * each), device=self.device)
        together = max(1, self.at_once // (self.count * each))
        for first in range(0, len(self.forms), together):
            some = slice(first, first + together)
            self._search(self.forms[some], rows[some], logits_of, images, labels, counts)

    def _search(
        self,
        forms: Sequence[TriggerForm],
        rows: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        counts: bool,
    ) -> None:
        """Take a step of these forms, in one batch, on the images of rows [forms, P * each]."""
        each = rows.shape[1] // self.count
        full = torch.ones(rows.shape[1], device=self.device)
        leaves, shown = [], []
        with torch.enable_grad():
            for form, drawn in zip(forms, rows, strict=True):
                own = [p.detach().requires_grad_() for p in form.parameters]
                leaves.append(own)
                shown.append(
                    form.apply(images[drawn], [p.repeat_interleave(each, 0) for p in own], full)
                )
            logits = logits_of(torch.cat(shown)).split(rows.shape[1])
            losses, rates = [], []
            for form, drawn, answers in zip(forms, rows, logits, strict=True):
                target = form.target.repeat_interleave(each)
                others = (labels[drawn] != target).float()
                loss = F.cross_entropy(answers, target, reduction="none")
                losses.append(self._mean(loss, others).sum())
                rates.append(self._mean((answers.detach().argmax(1) == target).float(), others))
            flat = [p for own in leaves for p in own]
            gradients = list(torch.autograd.grad(torch.stack(losses).sum(), flat))
        with torch.no_grad():
            for form, rate in zip(forms, rates, strict=True):
                form.descend([gradients.pop(0) for _ in form.parameters])
                if counts:
                    form.success.lerp_(rate, 0.3)

    def _mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean of each trigger's images, [P]."""
        values, weights = (t.view(self.count, -1) for t in (values, weights))
        return (values * weights).sum(1) / weights.sum(1).clamp(min=1)

    @torch.no_grad()
    def measure(
        self,
        logits_of: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        each: int,
    ) -> None:
        """Measure the openness of every trigger; arguments as of :meth:`search`."""
        full = torch.ones(self.count * each, device=self.device)
        for form in self.forms:
            rows = torch.randint(len(labels), (self.count * each,), device=self.device)
            half = [p.repeat_interleave(each, 0) for p in form.halved()]
            target = form.target.repeat_interleave(each)
            shown = form.apply(images[rows], half, full).split(self.at_once)
            answers = torch.cat([logits_of(part).argmax(1) for part in shown])
            others = (labels[rows] != target).float()
            form.openness.copy_(self._mean((answers == target).float(), others))

    @torch.no_grad()
    def aim(self, evidence: Tensor) -> None:
        """Take the evidence [K], and draw the class of two triggers in three by it."""
        self.evidence.copy_(evidence)
        aimed = 2 * self.count // 3
        for form in self.forms:
            form.target[:aimed].copy_(_drawn_by(self._by_evidence(), aimed))

    def _by_evidence(self) -> Tensor:
        weights = self.evidence**_EVIDENCE_POWER
        return weights / weights.sum()

    @torch.no_grad()
    def restart(self, first: bool = False) -> None:
        """Draw grown triggers that have failed anew, for classes that may be open.

        Args:
            first: the model is the suspect itself; what does not work there with half of its
                budget has failed.
        """
        for form, latest, at_first in zip(self.forms, self._open, self._open_at_first, strict=True):
            grown = (form.age >= ANNEAL).float()
            found = torch.zeros_like(latest)
            found.scatter_reduce_(0, form.target, form.openness * grown, "amax")
            latest.copy_(torch.maximum(found, _FADES * latest))
            if first:
                at_first.copy_(found)
            works = form.openness if first else form.success
            best = (works * grown).max()
            failed = (works < _FAILED) | (works < _FAR_BEHIND * best)
            if not first:
                failed &= form.age >= ANNEAL + 4
            chosen = _drawn_by(self._class_weights(latest, at_first), self.count)
            form.target.copy_(torch.where(failed, chosen, form.target))
            form.draw_anew(failed)
        if first:
            best_of_form = self._open_at_first.amax(1)
            self._form_weights.copy_(best_of_form**_FORM_POWER + 1e-6)
            self._share.copy_((best_of_form.amax() / _OPEN).clamp(_LEAST_SHARE, 1))

    def _class_weights(self, latest: Tensor, at_first: Tensor) -> Tensor:
        """Return the weights [K] of the classes in a draw, of their openness now and at first."""
        weights = (_FROM_SUSPECT * at_first + (1 - _FROM_SUSPECT) * latest) ** _OPENNESS_POWER
        weights = weights / weights.sum().clamp(min=1e-6)
        weights = torch.lerp(weights, self._by_evidence(), _BY_EVIDENCE)
        return weights + _EVENLY / self.classes

    @torch.no_grad()
    def remember(self, number: int) -> None:
        """Keep the triggers as they are, instead of the oldest; number 0 is kept for good."""
        place = 1 + (number - 1) % (self._ring - 1) if number else 0
        rows = slice(place * self.count, (place + 1) * self.count)
        for form, earlier, weights in zip(self.forms, self._earlier, self._weights, strict=True):
            for kept, parameter in zip(earlier, form.parameters, strict=True):
                kept[rows].copy_(parameter)
            weights[rows].copy_(self._preference(form))

    def _preference(self, form: TriggerForm) -> Tensor:
        """Return each trigger's weight in the draw, [P]: 0 before it is nearly of its size."""
        works = (form.age >= 0.7 * ANNEAL) & (form.success > _FAILED)
        return works * (form.openness**_SHOWS + _AT_LEAST)

    @torch.no_grad()
    def show(self, images: Tensor) -> Tensor:
        """Put a trigger on each image [B, C, H, W] in 0..1, half of them earlier states.

        The images are in random order.
        """
        count = len(images)
        form_of = _drawn_by(self._form_weights, count)
        carries = torch.rand(count, device=self.device) < self._share
        out = images
        for number, form in enumerate(self.forms):
            rows, works = _drawn_if_any(self._preference(form), count - count // 2)
            old, worked = _drawn_if_any(self._weights[number], count // 2)
            chosen = [
                torch.cat([parameter[rows], kept[old]])
                for parameter, kept in zip(form.parameters, self._earlier[number], strict=True)
            ]
            strength = torch.cat([works, worked]) * carries * _strengths(count, self.device)
            shown = form.apply(images, form.varied(chosen), strength)
            out = torch.where((form_of == number)[:, None, None, None], shown, out)
        return out


def _drawn_by(weights: Tensor, count: int) -> Tensor:
    """Draw ``count`` indices in proportion to weights, without a wait for the device."""
    sums = torch.cumsum(weights, 0)
    places = torch.rand(count, device=weights.device) * sums[-1]
    return torch.searchsorted(sums, places, right=True).clamp(max=len(weights) - 1)


def _drawn_if_any(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw as :func:`_drawn_by`; also 1 for each index, or 0 where all weights are zero."""
    rows = _drawn_by(weights, count)
    return rows, (weights[rows] > 0).float()


def _strengths(count: int, device: torch.device) -> Tensor:
    """Draw strengths [B]: some below 1."""
    weak = torch.rand(count, device=device) < _WEAKENED
    return torch.where(weak, 0.5 + 0.5 * torch.rand(count, device=device), 1.0)
