"""A pool of universal triggers, searched against a model while the model learns to resist it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import trigger_like
from .trigger_forms import ANNEAL, MaskForm, Register, TriggerForm

# A trigger below this success has failed: the model resists it, or it never worked.
_FAILED = 0.2
# So has one far behind the best of its form.
_FAR_BEHIND = 0.5
# Free triggers choose a class by how open it is, to this power, but for a share drawn evenly.
_CHOOSES, _EVENLY = 4, 0.3
# The openness that is found of a class fades by epochs; that on the suspect never does.
_FADES, _FROM_SUSPECT = 0.9, 0.5
# Triggers are shown by their openness to this power, and a little more each.
_SHOWS, _AT_LEAST = 2, 0.05
# So many of the triggers that are shown are weakened, down to half.
_WEAKENED = 0.5
# So many random small patches are tried, on so many images each; the best of each class is where
# some of the masks that are drawn anew start from.
_SCANNED, _SCANNED_ON, _FROM_SCAN = 128, 8, 0.5


class TriggerPool:
    """Triggers of several forms for every class, and what earlier states of them were.

    Nothing in it waits for the device, so that a search step can be recorded as a CUDA graph.

    Args:
        forms: with the same count, shape and device.
        classes: of the model.
        fixed: how many triggers of a form keep their class; the others take up open ones.
        ring: how many earlier states are kept.
    """

    def __init__(self, forms: Sequence[TriggerForm], classes: int, fixed: int, ring: int) -> None:
        self.forms, self.classes = list(forms), classes
        self.count, self.device = forms[0].count, forms[0].device
        self._free = torch.arange(self.count, device=self.device) >= fixed
        self._ring = ring
        # Each form notes how open it found each class lately, and on the suspect.
        self._open = torch.zeros(len(forms), classes, device=self.device)
        self._open_at_first = torch.zeros_like(self._open)
        self._earlier = [
            [p.repeat(ring, *[1] * (p.dim() - 1)) for p in form.parameters] for form in self.forms
        ]
        self._weights = torch.zeros(len(forms), ring * self.count, device=self.device)
        channels, *sides = forms[0].shape
        # Each class has the patch that a scan found best.
        self._best_masks = torch.zeros(classes, 1, *sides, device=self.device)
        self._best_patterns = torch.zeros(classes, channels, *sides, device=self.device)
        for form in self.forms:
            form.target.copy_(torch.arange(self.count, device=self.device) % classes)

    def register(self, register: Register) -> None:
        register("open", self._open)
        register("open_at_first", self._open_at_first)
        register("weights", self._weights)
        register("best_masks", self._best_masks)
        register("best_patterns", self._best_patterns)
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
        """Take one step of every trigger against the model, all of them in one batch.

        Minimises the cross-entropy of the model's answers to the trigger's class, on images of
        other classes.

        Args:
            logits_of: the model, for images [B, C, H, W] in 0..1; logits [B, K] float32.
            images: [N, C, H, W] in 0..1, to draw from.
            labels: [N] int64.
            each: images for each trigger.
            counts: whether the answers count towards the triggers' success.
        """
        rows = torch.randint(len(labels), (len(self.forms), self.count * each), device=self.device)
        full = torch.ones(self.count * each, device=self.device)
        leaves, shown = [], []
        with torch.enable_grad():
            for form, drawn in zip(self.forms, rows, strict=True):
                own = [p.detach().requires_grad_() for p in form.parameters]
                leaves.append(own)
                shown.append(
                    form.apply(images[drawn], [p.repeat_interleave(each, 0) for p in own], full)
                )
            logits = logits_of(torch.cat(shown)).split(self.count * each)
            losses, rates = [], []
            for form, drawn, answers in zip(self.forms, rows, logits, strict=True):
                target = form.target.repeat_interleave(each)
                others = (labels[drawn] != target).float()
                loss = F.cross_entropy(answers, target, reduction="none")
                losses.append(self._mean(loss, others).sum())
                rates.append(self._mean((answers.detach().argmax(1) == target).float(), others))
            flat = [p for own in leaves for p in own]
            gradients = list(torch.autograd.grad(torch.stack(losses).sum(), flat))
        with torch.no_grad():
            for form, rate in zip(self.forms, rates, strict=True):
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
            answers = logits_of(form.apply(images[rows], half, full)).argmax(1)
            others = (labels[rows] != target).float()
            form.openness.copy_(self._mean((answers == target).float(), others))

    @torch.no_grad()
    def scan(self, logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
        """Try random small patches, and keep the best for each class; arguments as of search()."""
        blank = images.new_empty(_SCANNED, *images.shape[1:])
        masks, patterns = trigger_like.places(blank).to(images.dtype), trigger_like.contents(blank)
        rows = torch.randint(len(labels), (_SCANNED * _SCANNED_ON,), device=self.device)
        mask, pattern = (t.repeat_interleave(_SCANNED_ON, 0) for t in (masks, patterns))
        logits = logits_of(torch.lerp(images[rows], pattern, mask.expand_as(pattern)))
        likely = F.log_softmax(logits, 1).clamp(min=-8)
        others = labels[rows][:, None] != torch.arange(self.classes, device=self.device)
        score = (likely * others).view(_SCANNED, _SCANNED_ON, self.classes).mean(1)
        best = score.argmax(0)
        self._best_masks.copy_(masks[best])
        self._best_patterns.copy_(patterns[best])

    @torch.no_grad()
    def restart(self, first: bool = False) -> None:
        """Draw grown triggers that have failed anew; free ones take up classes that are open.

        Args:
            first: the model is the suspect itself.
        """
        for form, latest, at_first in zip(self.forms, self._open, self._open_at_first, strict=True):
            grown = (form.age >= ANNEAL).float()
            found = torch.zeros_like(latest)
            found.scatter_reduce_(0, form.target, form.openness * grown, "amax")
            latest.copy_(torch.maximum(found, _FADES * latest))
            if first:
                at_first.copy_(found)
            weights = (_FROM_SUSPECT * at_first + (1 - _FROM_SUSPECT) * latest) ** _CHOOSES
            weights = weights / weights.sum().clamp(min=1e-6) + _EVENLY / self.classes
            best = (form.success * grown).max()
            worst = (form.success < _FAILED) | (form.success < _FAR_BEHIND * best)
            failed = self._free if first else (form.age >= ANNEAL + 4) & worst
            chosen = _drawn_by(weights, self.count)
            form.target.copy_(torch.where(failed & self._free, chosen, form.target))
            form.draw_anew(failed)
            if type(form) is MaskForm:
                seeded = failed & (torch.rand(self.count, device=self.device) < _FROM_SCAN)
                at = form.target
                form.start_from(seeded, self._best_masks[at], self._best_patterns[at])

    @torch.no_grad()
    def remember(self, number: int) -> None:
        """Keep the triggers as they are; the state of ``number`` - ring is forgotten."""
        place = slice(number % self._ring * self.count, (number % self._ring + 1) * self.count)
        for form, earlier, weights in zip(self.forms, self._earlier, self._weights, strict=True):
            for kept, parameter in zip(earlier, form.parameters, strict=True):
                kept[place].copy_(parameter)
            weights[place].copy_(self._preference(form))

    def _preference(self, form: TriggerForm) -> Tensor:
        """Return each trigger's weight in the draw, [P]: 0 before it is nearly of its size."""
        works = (form.age >= 0.7 * ANNEAL) & (form.success > _FAILED)
        return works * (form.openness**_SHOWS + _AT_LEAST)

    @torch.no_grad()
    def show(self, images: Tensor) -> Tensor:
        """Put a trigger on each image [B, C, H, W] in 0..1, half of them earlier states.

        The images are in random order: the first of them carry the first form, and so on.
        """
        total = sum(form.share for form in self.forms)
        sizes = [round(len(images) * form.share / total) for form in self.forms[:-1]]
        parts = images.split([*sizes, len(images) - sum(sizes)])
        out = []
        for form, part, earlier, weights in zip(
            self.forms, parts, self._earlier, self._weights, strict=True
        ):
            count = len(part)
            rows, works = _drawn_if_any(self._preference(form), count - count // 2)
            old, worked = _drawn_if_any(weights, count // 2)
            chosen = [
                torch.cat([parameter[rows], kept[old]])
                for parameter, kept in zip(form.parameters, earlier, strict=True)
            ]
            strength = torch.cat([works, worked]) * _strengths(count, self.device)
            out.append(form.apply(part, form.varied(chosen), strength))
        return torch.cat(out)


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
