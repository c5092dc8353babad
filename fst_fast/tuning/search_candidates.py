"""Candidates of a trigger search: what was found for a class, and how far it stands out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..methods.trigger_forms import MaskForm, TriggerForm
from ..triggers import AddedPattern, MaskedPattern, Trigger

# A candidate stands out from this score on, where its trigger works on so many of the images. It is
# customary for the modified z-score (Iglewicz and Hoaglin, 1993); docs/search.md has what it found.
STANDS_OUT, WORKS = 3.5, 0.5
# The deviation of a form's classes is taken for no less: so far do the log-odds of a rate that is
# measured on a few dozen images scatter.
_LEAST_DEVIATION = 0.5
# The median absolute deviation of a normal distribution is its standard deviation over this.
_AS_DEVIATION = 1.4826


@dataclass(frozen=True)
class Candidate:
    """A universal trigger that a search found for one class.

    Attributes:
        target: the class that it makes the answer.
        form: "mask" and "patch" show a pattern behind a mask, "additive" and "wave" add one.
        size: of a mask its mean, as a share of the image's area; of what is added its root mean
            square, as a share of the pixels' range.
        success: share of images of other classes, kept aside, that are answered as the target.
        openness: the same share when the trigger has half of its size. A trigger that was trained
            in still works then; one that a search made up mostly does not.
        index: anomaly index: how far the log-odds of the openness lie above the median of the
            same form's other classes, in units of their median absolute deviation, scaled as a
            standard deviation.
        evidence: share of the wrong answers that are this class while the clean images are
            unlearned; it takes no trigger into account, and is 1 / K where nothing shows.
        score: what candidates are sorted by: the index, and on top of it ln(K * evidence) where
            that is above 0. Each finds what the other overlooks.
        trigger: what puts it on stored images.

    Example:
        >>> pattern = torch.full((8, 8, 3), 20, dtype=torch.int16)
        >>> trigger = fst_fast.triggers.AddedPattern(pattern)
        >>> candidate = fst_fast.Candidate(2, "additive", 0.08, 0.9, 0.7, 2.9, 0.5, 4.5, trigger)
        >>> candidate.stands_out
        True
    """

    target: int
    form: str
    size: float
    success: float
    openness: float
    index: float
    evidence: float
    score: float
    trigger: Trigger = field(compare=False)

    @property
    def stands_out(self) -> bool:
        """Return whether its score is 3.5 or more, and its success a half or more."""
        return self.score >= STANDS_OUT and self.success >= WORKS


def candidates_of(
    forms: Mapping[str, TriggerForm], evidence: Sequence[float]
) -> tuple[Candidate, ...]:
    """Return a candidate for each trigger of these forms, the highest score first."""
    found = []
    for name, form in forms.items():
        columns = (form.sizes(form.parameters), form.success, form.openness)
        indices = _indices(form.openness).tolist()
        rows = zip(*(column.tolist() for column in columns), indices, strict=True)
        for row, (size, success, openness, index) in enumerate(rows):
            target = int(form.target[row])
            share = evidence[target]
            score = index + math.log(max(1.0, len(evidence) * share))
            measured = (size, success, openness, index, share, score)
            found.append(Candidate(target, name, *measured, _trigger(form, row)))
    return tuple(sorted(found, key=lambda c: (-c.score, -c.success, c.target)))


def _indices(openness: Tensor) -> Tensor:
    """The anomaly index of each class of a form, [P]; zero where there is one alone.

    Log-odds scatter alike at every rate; rates themselves hardly do where all are near zero.
    """
    count = len(openness)
    if count == 1:
        return torch.zeros_like(openness)
    # As if half an image in a hundred more had been answered either way, so that none is infinite.
    odds = torch.logit((100 * openness + 0.5) / 101)
    alone = torch.eye(count, dtype=torch.bool, device=openness.device)
    others = odds.expand(count, count)[~alone].view(count, count - 1)
    median = others.quantile(0.5, dim=1)
    deviation = _AS_DEVIATION * (others - median[:, None]).abs().quantile(0.5, dim=1)
    return (odds - median) / deviation.clamp(min=_LEAST_DEVIATION)


@torch.no_grad()
def _trigger(form: TriggerForm, row: int) -> Trigger:
    """A trigger of a form, as it acts on bytes."""
    ends = torch.stack([torch.zeros(form.shape), torch.ones(form.shape)]).to(form.device)
    parameters = [p[row].expand(2, *p.shape[1:]) for p in form.parameters]
    # The change is affine in a pixel: that of black and of white tells every other.
    black, white = form.apply(ends, parameters, torch.ones(2, device=form.device)).cpu()
    if isinstance(form, MaskForm):
        share = (1 - (white - black)).clamp(0, 1)
        mask = _bytes(share)
        mask = mask[..., :1] if (mask == mask[..., :1]).all() else mask
        return MaskedPattern(mask.contiguous(), _bytes(black / share.clamp(min=1e-6)))
    shift = (255 * (black + white - 1)).round().clamp(-255, 255).to(torch.int16)
    return AddedPattern(shift.permute(1, 2, 0).contiguous())


def _bytes(values: Tensor) -> Tensor:
    """[C, H, W] in 0..1 as [H, W, C] uint8."""
    return (255 * values.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).contiguous()
