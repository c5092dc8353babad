"""Successive halving of a trigger search: more steps for the classes where more is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.trigger_forms import ANNEAL, TriggerForm
from ..methods.trigger_pool import TriggerPool
from .search_images import SearchImages

# Shares of the steps that the rounds take; behind each, the better half of every form goes on.
_ROUNDS = (0.5, 0.25, 0.25)
# A trigger cannot be judged before its size is down to its budget.
LEAST_STEPS = 2 * (ANNEAL + 2)
# Every trigger sees so many images in a step, and is measured on so many.
_EACH, _MEASURED = 5, 100
# So many images, of so many values in all, go through the model at once.
_AT_ONCE, VALUES_AT_ONCE = 256, 2**22

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FormKind:
    """A form with its budget: what size its triggers may have."""

    form: type[TriggerForm]
    budget: float


class SearchRounds:
    """Triggers of every form for every class, on one model that stays as it is.

    Args:
        logits_of: the model, for images [B, C, H, W] in 0..1; logits [B, K] float32.
        data: clean images.
        kinds: the forms by name.
        targets: the classes that triggers are searched for.
    Attributes:
        forms: by name, with one trigger for each target in order; ``success`` and ``openness`` are
            what was measured last, on images kept aside.
    """

    def __init__(
        self,
        logits_of: Logits,
        data: SearchImages,
        kinds: Mapping[str, FormKind],
        targets: Sequence[int],
    ) -> None:
        self._logits_of, self._data, self._kinds = logits_of, data, kinds
        self.forms = {name: self._made(kind, len(targets)) for name, kind in kinds.items()}
        for form in self.forms.values():
            form.target.copy_(torch.tensor(targets))
        self._at_once = at_once(data.images)

    def _made(self, kind: FormKind, count: int) -> TriggerForm:
        images = self._data.images
        channels, height, width = images.shape[1:]
        return kind.form(count, (channels, height, width), kind.budget, images.device)

    def run(self, steps: int, told: Callable[[int, int], None]) -> None:
        """Search and measure in rounds.

        Args:
            steps: of the triggers that take part in every round.
            told: called before each round with its number, from 1, and the classes in it.
        """
        count = len(next(iter(self.forms.values())).target)
        goes_on = {name: torch.arange(count) for name in self.forms}
        rounds = [round(steps * share) for share in _ROUNDS[1:]]
        for number, length in enumerate([steps - sum(rounds), *rounds], 1):
            told(number, count)
            self._search(goes_on, length)
            for name, rows in goes_on.items():
                self._measure(self.forms[name], rows)
            count = (count + 1) // 2
            goes_on = {name: self._better(name, rows, count) for name, rows in goes_on.items()}

    def _better(self, name: str, rows: Tensor, count: int) -> Tensor:
        """The ``count`` rows where the trigger is most open; success decides between equals."""
        form = self.forms[name]
        opened, success = form.openness.tolist(), form.success.tolist()
        best = sorted(rows.tolist(), key=lambda row: (-opened[row], -success[row]))[:count]
        return torch.tensor(sorted(best))

    def _search(self, rows: Mapping[str, Tensor], steps: int) -> None:
        """Take steps of these triggers, so many at once as fit."""
        each = max(1, self._at_once // (_EACH * len(rows)))
        parts = {name: some.split(each) for name, some in rows.items()}
        for chunk in zip(*parts.values(), strict=True):
            self._search_at_once(dict(zip(parts, chunk, strict=True)), steps)

    def _search_at_once(self, rows: Mapping[str, Tensor], steps: int) -> None:
        parts = _halves(rows)
        try:
            self._step(rows, steps)
            return
        except RuntimeError as error:
            if len(parts) == 1 or not memory_lacks(error):
                raise
        # Behind the handler, the error no longer holds what it was computed from.
        for part in parts:
            self._search_at_once(part, steps)

    def _step(self, rows: Mapping[str, Tensor], steps: int) -> None:
        count = len(next(iter(rows.values())))
        small = {name: self._made(self._kinds[name], count) for name in rows}
        pool = TriggerPool(list(small.values()), count, 1)
        pairs = [
            (tensor, _state(self.forms[name])[part], some)
            for name, some in rows.items()
            for part, tensor in _state(small[name]).items()
        ]
        for tensor, all_of_them, some in pairs:
            tensor.copy_(all_of_them[some])
        for _ in range(steps):
            pool.search(self._logits_of, self._data.images, self._data.labels, _EACH)
        for tensor, all_of_them, some in pairs:
            all_of_them[some] = tensor

    @torch.no_grad()
    def _measure(self, form: TriggerForm, rows: Tensor) -> None:
        """Measure success and openness of these triggers on images that are kept aside."""
        whole, half = form.parameters, form.halved()
        for row in rows.tolist():
            others = (self._data.aside_labels != form.target[row]).nonzero().flatten()
            # They are spread over the classes, in whatever order these come.
            spread = torch.linspace(0, len(others) - 1, min(len(others), _MEASURED))
            images = self._data.aside[others[spread.round().long().to(others.device)]]
            for rate, parameters in ((form.success, whole), (form.openness, half)):
                rate[row] = self._rate(form, [p[row] for p in parameters], images, row)

    def _rate(
        self, form: TriggerForm, parameters: Sequence[Tensor], images: Tensor, row: int
    ) -> Tensor:
        hits = torch.zeros((), device=images.device)
        for part in images.split(self._at_once):
            shown = form.apply(
                part,
                [p.expand(len(part), *p.shape) for p in parameters],
                torch.ones(len(part), device=part.device),
            )
            hits += (self._logits_of(shown).argmax(1) == form.target[row]).sum()
        return hits / len(images)


def _state(form: TriggerForm) -> dict[str, Tensor]:
    """All tensors of the triggers, [P, ...] each, by name."""
    found: dict[str, Tensor] = {}
    form.register(found.__setitem__)
    return found


def _halves(rows: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of each form in two parts; of one row each, the forms by themselves."""
    count = len(next(iter(rows.values())))
    if count == 1:
        return [{name: some} for name, some in rows.items()]
    halves = (slice(0, count // 2), slice(count // 2, count))
    return [{name: some[half] for name, some in rows.items()} for half in halves]


def at_once(images: Tensor) -> int:
    """Return how many images of this size go through a model at once, there and back."""
    return max(1, min(_AT_ONCE, VALUES_AT_ONCE // images[0].numel()))


def memory_lacks(error: RuntimeError) -> bool:
    """Return whether an error tells that the memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
