"""Tuning against triggers that are searched on the model itself: ``purify(alpha="auto")``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import Batch, Closure, Method, Run
from .class_evidence import IMAGES, MOST_IMAGES, class_evidence
from .trigger_forms import AdditiveForm, MaskForm, PatchForm, TriggerForm, WaveForm
from .trigger_like import FAMILIES, changed
from .trigger_pool import TriggerPool

# Each form has so many triggers.
_TRIGGERS = 12
# So many rounds of search steps come before the first epoch; what fails in one is drawn anew.
_ROUNDS, _ROUND = 2, 32
# So many search steps come before each further epoch: half on the suspect.
_EACH_EPOCH = 4
# So many earlier states of the triggers are kept, in so many bytes.
_EARLIER, _EARLIER_BYTES = 16, 64 * 2**20
# So many clean images are kept for the search, in so many bytes.
_IMAGES, _IMAGE_BYTES = 1024, 256 * 2**20
# Small images go through the model so many at once at least; others as many as a batch has.
_AT_ONCE, _SMALL = 256, 64 * 64
# A candidate's success is measured on so many images, and its openness on the suspect on so many.
_MEASURED, _MEASURED_AT_FIRST = 64, 30
FORMS: Mapping[str, type[TriggerForm]] = {
    form.name: form for form in (MaskForm, PatchForm, AdditiveForm, WaveForm)
}
# A place of a patch's mask counts as so many pixels towards the area.
_STAMPED = 5


@dataclass(frozen=True)
class TriggerUnlearning(Method):
    """Search triggers on the model while it is tuned, and show them with their true labels.

    A backdoor is a small universal change that makes the answer one class. Which class that may be
    is told by unlearning clean images on a copy
    (:func:`~fst_fast.methods.class_evidence.class_evidence`). Such changes are then searched by
    gradients, most of them for that class, in several forms (a pattern behind a small mask, an
    added pattern of small norm, stripes and a smooth field), before the first epoch and a little
    before every further one, on the model as it is and on the suspect. What the model has learnt to
    resist is drawn anew. Half of every batch carries what was found, with the images' true labels:
    the more often, the better it works with half of its size, as triggers do that were trained in.
    A form that finds nothing of that kind on the suspect is shown less. Otherwise the model is
    tuned as by plain fine-tuning. Neither the trigger nor the target is asked for.

    The search is that of a universal adversarial perturbation (Moosavi-Dezfooli et al., CVPR 2017,
    arXiv 1610.08401) in the forms of Neural Cleanse (Wang et al., IEEE S&P 2019); tuning against
    it with true labels is the unlearning of the latter, here in alternation as in adversarial
    training (Madry et al., ICLR 2018, arXiv 1706.06083). docs/alpha.md says what it was chosen on.

    Args:
        found: share of each batch that carries searched triggers.
        random: share of each batch that carries random changes like those of published triggers.
        mask_area: budget of masks and patches, as a share of the image's area.
        additive_rms: budget of an added pattern, its root mean square as a share of the pixels'
            range.
        wave_rms: the same for stripes and smooth fields.
        forms: names in FORMS that are searched. "wave" finds stripes over the whole image, which no
            other form does. "patch", solid small patches, is left out.
        images_per_trigger: clean images in a step of the search, for each trigger; fewer where the
            loader's batches are small and its images are not.
        left_out: families of random changes that are not used (for experiments that leave the
            attack's own family out): names in fst_fast.methods.trigger_like.FAMILIES.
    """

    name: ClassVar[str] = "trigger_unlearning"
    epochs_factor: ClassVar[int] = 4
    cost: ClassVar[str] = "1, and the search"

    found: float = 0.5
    random: float = 0.0
    mask_area: float = 0.02
    additive_rms: float = 0.0235
    wave_rms: float = 0.07
    forms: tuple[str, ...] = ("mask", "additive", "wave")
    images_per_trigger: int = 5
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for setting in ("found", "random", "mask_area", "additive_rms", "wave_rms"):
            value = getattr(self, setting)
            if not (isinstance(value, int | float) and 0 <= value <= 1):
                raise ValueError(
                    f"trigger_unlearning: {setting} must be a number in 0..1, got {value!r}; the "
                    f"default is {type(self).__dataclass_fields__[setting].default}"
                )
        if self.found + self.random > 1:
            raise ValueError(
                "trigger_unlearning: found and random must be shares of one batch, got "
                f"{self.found} and {self.random}; their sum is at most 1"
            )
        if not isinstance(self.images_per_trigger, int) or self.images_per_trigger < 1:
            raise ValueError(
                "trigger_unlearning: images_per_trigger must be an integer >= 1, got "
                f"{self.images_per_trigger!r}"
            )
        for setting, known in (("forms", FORMS), ("left_out", FAMILIES)):
            names = tuple(getattr(self, setting))
            object.__setattr__(self, setting, names)
            unknown = [name for name in names if name not in known]
            if unknown or (setting == "forms" and not names):
                raise ValueError(
                    f"trigger_unlearning: {setting} must be names among {', '.join(known)}, got "
                    f"{', '.join(map(str, unknown)) or 'none'}"
                )

    def search_images(self, epochs: int, classes: int) -> int:
        """Return how many images the searches of a run pass through the model, there and back."""
        steps = _ROUNDS * _ROUND + _EACH_EPOCH * (epochs - 1)
        return MOST_IMAGES + steps * len(self.forms) * _TRIGGERS * self.images_per_trigger

    def begin(self, run: Run) -> None:
        run.memo["search"] = _Search(self, run)

    def begin_epoch(self, run: Run, epoch: int) -> None:
        if not run.goes_on_within:
            run.memo["search"].before_epoch(epoch)

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        return closure(run.memo["search"].shown(batch))

    def finish(self, run: Run) -> None:
        run.findings.extend(run.memo["search"].candidates())


class _Search:
    """The triggers of one run, and the images that they are searched on."""

    def __init__(self, method: TriggerUnlearning, run: Run) -> None:
        self.method, self.run = method, run
        images, self.labels = run.sample(_IMAGES, _IMAGE_BYTES)
        low, high = run.pixel_range(images)
        self.low, self.span = low, (high - low).clamp(min=1e-6)
        self.images = self._unit(images)
        self.suspect = copy.deepcopy(run.model).eval().requires_grad_(False)
        channels, height, width = images.shape[1:]
        count = _TRIGGERS
        budgets = {
            "mask": method.mask_area,
            "patch": method.mask_area / _STAMPED,
            "additive": method.additive_rms,
            "wave": method.wave_rms,
        }
        forms = [
            FORMS[name](count, (channels, height, width), budgets[name], images.device)
            for name in method.forms
        ]
        state_bytes = count * sum(p[0].numel() * 4 for form in forms for p in form.parameters)
        ring = max(2, min(_EARLIER, _EARLIER_BYTES // state_bytes))
        most = max(run.batch_size, _AT_ONCE) if height * width <= _SMALL else run.batch_size
        self.each = max(1, min(method.images_per_trigger, most // count))
        self.pool = TriggerPool(forms, run.classes, ring, max(most, count))
        # These were found on the suspect, and are tried again on the tuned model.
        self.first = [[p.clone() for p in form.parameters] for form in forms]
        self.first_target = [form.target.clone() for form in forms]
        self.pool.register(lambda name, tensor: run.register(f"search.{name}", tensor))
        for form, parameters, target in zip(forms, self.first, self.first_target, strict=True):
            for number, tensor in enumerate([*parameters, target]):
                run.register(f"search.{form.name}.first.{number}", tensor)
        self.before = [torch.zeros(count, device=images.device) for _ in forms]
        for form, rate in zip(forms, self.before, strict=True):
            run.register(f"search.{form.name}.before", rate)

    def _unit(self, images: Tensor) -> Tensor:
        return ((images.float() - self.low) / self.span).clamp(0, 1)

    def _logits(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        return self.run.logits(images * self.span + self.low, model)

    def _suspect_logits(self, images: Tensor) -> Tensor:
        return self._logits(images, self.suspect)

    def _step(self) -> None:
        self.pool.search(self._logits, self.images, self.labels, self.each)

    def _step_on_suspect(self) -> None:
        self.pool.search(self._suspect_logits, self.images, self.labels, self.each, counts=False)

    def _measure(self) -> None:
        self.pool.measure(self._logits, self.images, self.labels, 2 * self.each)

    def _measure_at_first(self) -> None:
        self.pool.measure(self._logits, self.images, self.labels, _MEASURED_AT_FIRST)

    def before_epoch(self, epoch: int) -> None:
        """Search on; before the first epoch the model is the suspect."""
        run = self.run
        run.model.eval()
        if epoch:
            run.repeat("measure", self._measure, 1)
            self.pool.remember(epoch)
            self.pool.restart()
            for _ in range(_EACH_EPOCH // 2):
                run.repeat("search", self._step, 1)
                run.repeat("search on the suspect", self._step_on_suspect, 1)
            return
        self.pool.aim(self._evidence())
        for number in range(_ROUNDS):
            if number:
                self.pool.restart(first=True)
            run.repeat("search", self._step, _ROUND)
            run.repeat("measure on the suspect", self._measure_at_first, 1)
        self._keep_first()
        self.pool.remember(0)
        self.pool.restart(first=True)

    def _evidence(self) -> Tensor:
        run = self.run
        return class_evidence(
            *(run.model, self._logits, self.images, self.labels, run.classes),
            at_once=min(IMAGES, self.pool.at_once),
        )

    def _keep_first(self) -> None:
        """Keep what was found on the suspect, and its success there."""
        for form, first, target in zip(self.pool.forms, self.first, self.first_target, strict=True):
            target.copy_(form.target)
            for kept, parameter in zip(first, form.parameters, strict=True):
                kept.copy_(parameter)
        for kept, rate in zip(self.before, self._rates(), strict=True):
            kept.copy_(rate)

    @torch.no_grad()
    def shown(self, batch: Batch) -> Batch:
        """The batch in random order, its first rows with searched triggers, the next changed."""
        count = len(batch.labels)
        order = torch.rand(count, device=batch.labels.device).argsort()
        inputs, labels = batch.inputs[order], batch.labels[order]
        found = round(self.method.found * count)
        random = round(self.method.random * count)
        changed_rows = inputs[: found + random]
        unit = self._unit(changed_rows)
        parts = [self.pool.show(unit[:found])] if found else []
        if random:
            parts.append(changed(unit[found:], self.method.left_out))
        if parts:
            shown = (torch.cat(parts) * self.span + self.low).to(inputs.dtype)
            inputs = torch.cat([shown, inputs[found + random :]])
        layout = torch.channels_last if _is_channels_last(batch.inputs) else torch.contiguous_format
        return Batch(inputs.contiguous(memory_format=layout), labels)

    @torch.no_grad()
    def _rates(self) -> list[Tensor]:
        """The success of what was found on the suspect, on the model as it is: [P] by form."""
        out = []
        for form, first, targets in zip(
            self.pool.forms, self.first, self.first_target, strict=True
        ):
            rates = []
            for number in range(form.count):
                images = self.images[:_MEASURED]
                one = [p[number : number + 1].expand(len(images), *p.shape[1:]) for p in first]
                full = torch.ones(len(images), device=images.device)
                answers = self._logits(form.apply(images, one, full)).argmax(1)
                others = self.labels[:_MEASURED] != targets[number]
                hits = (answers == targets[number]) & others
                rates.append(hits.sum() / others.sum().clamp(min=1))
            out.append(torch.stack(rates))
        return out

    def candidates(self) -> list[Mapping[str, Any]]:
        """Return what was found on the suspect, and its success before and after, best first."""
        self.run.model.eval()
        rows: list[Mapping[str, Any]] = []
        for form, first, targets, before, after in zip(
            *(self.pool.forms, self.first, self.first_target, self.before, self._rates()),
            strict=True,
        ):
            values = zip(
                *(targets.tolist(), form.sizes(first).tolist(), before.tolist(), after.tolist()),
                strict=True,
            )
            rows += [
                {"form": form.name, "target": t, "size": size, "before": b, "after": a}
                for t, size, b, a in values
            ]
        return sorted(rows, key=lambda row: -row["before"])


def _is_channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last)
