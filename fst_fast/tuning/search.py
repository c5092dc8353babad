"""The public verb that looks for universal triggers on a model, and changes nothing in it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..data import arguments
from ..data.batches import Batches, Loader, check_batch, resolve_device, resolve_precision
from ..data.device_loader import DeviceLoader
from ..heads.contexts import on_device, seeded
from ..heads.find import unwrap
from ..methods.class_evidence import IMAGES as EVIDENCE_IMAGES
from ..methods.class_evidence import class_evidence
from ..methods.trigger_forms import AdditiveForm, MaskForm, PatchForm, WaveForm
from ..triggers.pixels import Normalization, named_normalization
from .arguments import check_flags, check_model
from .progress import Bar
from .search_candidates import STANDS_OUT, Candidate, candidates_of
from .search_images import SearchImages, collect
from .search_result import SearchResult
from .search_rounds import LEAST_STEPS, FormKind, SearchRounds, at_once, memory_lacks
from .suspect_view import SuspectView

KINDS: Mapping[str, FormKind] = {
    "mask": FormKind(MaskForm, 0.02),
    "patch": FormKind(PatchForm, 0.004),
    "additive": FormKind(AdditiveForm, 0.0235),
    "wave": FormKind(WaveForm, 0.07),
}
# Above so many classes, only those with the most evidence are searched.
MOST_CLASSES = 30
# A model is near chance up to an accuracy of g + 0.5 g (1 - g), where a guess is right with
# probability g.
_CHANCE = 0.5
# The index says little where it compares fewer classes.
_COMPARED = 4
# A form opens every class where its median openness is this.
_ALL_OPEN = 0.5
# So many images are kept in the result, to draw triggers on.
_SAMPLES = 4


def search(
    model: nn.Module,
    loader: Loader,
    *,
    forms: Sequence[str] = ("mask", "additive", "wave"),
    classes: Sequence[int] | None = None,
    steps: int = LEAST_STEPS,
    normalize: Normalization | str | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Look for small universal changes that make one class the answer; the model is left alone.

    For every class and form, gradients search a change of all images alike that a backdoor's
    trigger may be (Wang et al., IEEE S&P 2019; Moosavi-Dezfooli et al., CVPR 2017, arXiv
    1610.08401), in one batch on a copy of the model. The better half of each form gets more steps
    (successive halving: Jamieson and Talwalkar, AISTATS 2016, arXiv 1502.07943). What is found is
    measured on images kept aside, at its full size and at half, and compared with what is found
    for other classes.

    Triggers of other forms (warps, rotations, changes that differ from image to image) are not
    looked for: where nothing is found, no door of these kinds was found, and no more is said.

    Args:
        model: any image classifier; DataParallel, DDP and torch.compile wrappers are looked
            through.
        loader: clean (images [B, C, H, W] float, labels [B] integer), as for
            :func:`fst_fast.purify`. A tenth of each class is kept aside.
        forms: "mask" (a small pattern anywhere), "patch" (solid small patches), "additive" (a
            faint pattern over the whole image), "wave" (stripes and smooth fields).
        classes: which to search; None takes all, or above 30 those on which the answers of the
            model gather when it unlearns its clean images, which a note says.
        steps: of the triggers that take part in every round, 64 or more.
        normalize: the (mean, std) per channel, in units of 0..1, that the loader's images were
            normalised with, or its name; None takes it from a DeviceLoader, or else means 0..1.
            Where the images lie elsewhere, black and white are guessed, which a note says.
        device: None takes the model's GPU, else any GPU, else the CPU.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where the device has instructions for
            it, else fp16 on a GPU and fp32 on a CPU.
        seed: of every random draw; the global random state is put back afterwards.
        progress: show a bar on a terminal, plain lines elsewhere.
    Returns:
        A :class:`SearchResult`.
    Raises:
        ValueError: an argument or a batch is not as described, or the model's gradient with
            respect to its input is zero or not finite.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
        >>> batches = [(torch.rand(30, 3, 8, 8), torch.arange(30) % 3)]
        >>> result = fst_fast.search(model, batches, forms=("mask",), classes=[0, 2],
        ...                          progress=False)
        >>> sorted(candidate.target for candidate in result.candidates)
        [0, 2]
    """
    check_model(unwrap(model) if isinstance(model, nn.Module) else model, "search")
    check_flags("search", progress=progress)
    kinds = _kinds(forms)
    steps = arguments.whole("search", "steps", steps, LEAST_STEPS)
    seed = arguments.seed("search", seed)
    normalize = named_normalization(normalize)
    if normalize is None and isinstance(loader, DeviceLoader):
        # Without a normalisation, its images lie in 0..1.
        normalize = loader.normalize
    place = resolve_device(device, model)
    precision = resolve_precision(precision, place)
    batches = Batches(loader, 1, "search: loader", at_once=True)
    started = time.perf_counter()
    with on_device(place), seeded(seed, place), _Report("search", 4, progress) as report:
        images, _ = check_batch(batches.first, batches.where, place)
        view = SuspectView(unwrap(model), images, place, precision)
        asked = _asked(classes, view.classes)
        data = collect(batches, place, view.classes, normalize)
        view.set_range(data.low, data.span)
        candidates, evidence, notes = _found(view, data, kinds, asked, steps, report)
    settings = {
        "forms": list(kinds),
        "classes": sorted({candidate.target for candidate in candidates}),
        "steps": steps,
        "seed": seed,
        "device": str(place),
        "precision": precision,
        "stands_out_from": STANDS_OUT,
        "images": len(data.labels),
        "images_kept_aside": 0 if data.aside is data.images else len(data.aside),
    }
    seconds = time.perf_counter() - started
    samples = (255 * data.aside[:_SAMPLES]).round().to("cpu", torch.uint8)
    samples = samples.permute(0, 2, 3, 1).contiguous()
    return SearchResult(candidates, evidence, notes, settings, seconds, samples)


class _Report(Bar):
    def stage(self, done: int, text: str) -> None:
        """Show what begins, and how many of the stages lie behind."""
        self._move(text, done)
        self._line(f"search: {text}")


def _found(
    view: SuspectView,
    data: SearchImages,
    kinds: Mapping[str, FormKind],
    asked: list[int] | None,
    steps: int,
    report: _Report,
) -> tuple[tuple[Candidate, ...], tuple[float, ...], tuple[str, ...]]:
    """The candidates, each class's evidence, and the notes, which are shown as well."""
    report.stage(0, f"evidence is gathered on {len(data.labels)} images")
    evidence = _evidence(view, data, at_once(data.images))
    targets, left_out = _targets(asked, evidence, data)
    rounds = SearchRounds(view.logits, data, kinds, targets)
    rounds.run(steps, lambda n, left: report.stage(n, f"round {n}: {left} classes a form"))
    candidates = candidates_of(rounds.forms, evidence)
    report.stage(4, f"{len(targets)} of {view.classes} classes were searched")
    notes = (*data.notes, *left_out, *_doubts(view, data, candidates))
    for note in notes:
        report.note(f"search: {note}")
    return candidates, tuple(evidence), notes


def _kinds(forms: object) -> dict[str, FormKind]:
    """The forms by name, in the order asked for."""
    listed = list(forms) if isinstance(forms, Iterable) and not isinstance(forms, str) else []
    if not listed or not all(isinstance(name, str) and name in KINDS for name in listed):
        raise ValueError(
            f"search: forms must be a sequence of names among {', '.join(KINDS)}, got {forms!r}; "
            'for one form use ("mask",)'
        )
    return {name: KINDS[name] for name in listed}


def _asked(classes: object, count: int) -> list[int] | None:
    """The classes asked for, in order; None for all."""
    if classes is None:
        return None
    if not isinstance(classes, Iterable) or isinstance(classes, str):
        raise ValueError(
            f"search: classes must be a sequence of integers or None, got {classes!r}; for one "
            "class use [class]"
        )
    listed = [arguments.whole("search", "classes", value, 0, count - 1) for value in classes]
    if not listed:
        raise ValueError("search: classes must name a class, got none; None takes all of them")
    return sorted(set(listed))


def _evidence(view: SuspectView, data: SearchImages, most: int) -> list[float]:
    """The share of each class, gathered on at most so many images at once, or as many as fit."""
    # Batch norm cannot be trained on one image.
    most = max(2, min(most, EVIDENCE_IMAGES))
    while True:
        try:
            return class_evidence(
                view.model, view.logits, data.images, data.labels, view.classes, most
            ).tolist()
        except RuntimeError as error:
            if most < 4 or not memory_lacks(error):
                raise
        most //= 2


def _targets(
    asked: list[int] | None, evidence: Sequence[float], data: SearchImages
) -> tuple[list[int], list[str]]:
    """The classes to search, and what is said of those left out."""
    notes = []
    targets = list(range(len(evidence))) if asked is None else asked
    if asked is None and len(targets) > MOST_CLASSES:
        ranked = sorted(targets, key=lambda target: -evidence[target])
        targets = sorted(ranked[:MOST_CLASSES])
        notes.append(
            f"of {len(evidence)} classes, only the {MOST_CLASSES} with the most evidence were "
            "searched; classes= names others"
        )
    present = data.labels.unique().tolist()
    if len(present) == 1 and present[0] in targets:
        targets.remove(present[0])
        notes.append(f"all images are of class {present[0]}, which cannot be searched for on them")
    if not targets:
        raise ValueError(
            f"search: loader must yield images of other classes than the one searched for, got "
            f"only class {present[0]}; add images of other classes"
        )
    if len(targets) < _COMPARED:
        notes.append(
            f"{len(targets)} classes were searched, and the index compares a class with the others "
            f"of its form: it says little of fewer than {_COMPARED}"
        )
    return targets, notes


@torch.no_grad()
def _doubts(view: SuspectView, data: SearchImages, candidates: Sequence[Candidate]) -> list[str]:
    """Return what speaks against reading anything into the candidates."""
    notes = []
    most = at_once(data.aside)
    parts = zip(data.aside.split(most), data.aside_labels.split(most), strict=True)
    right = sum(int((view.logits(x).argmax(1) == y).sum()) for x, y in parts)
    accuracy = right / len(data.aside_labels)
    guess = 1 / view.classes
    if accuracy <= guess + _CHANCE * guess * (1 - guess):
        notes.append(
            f"the model is near chance ({100 * accuracy:.1f} % of clean images right): on such a "
            "model a search finds whatever it looks for, and nothing follows from it"
        )
    for name in dict.fromkeys(candidate.form for candidate in candidates):
        opened = torch.tensor([c.openness for c in candidates if c.form == name])
        if opened.median() >= _ALL_OPEN:
            notes.append(
                f"most classes are open to the form {name}: a door among them need not stand out"
            )
    return notes
