"""The suite ``end2end``: time, clean accuracy and attack success of the whole job, together."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from fst_fast.data.device_loader import DeviceLoader
from fst_fast.lab.attack_metrics import measure_attack
from fst_fast.methods.trigger_unlearning import TriggerUnlearning
from fst_fast.tuning.purify import purify

from . import flops, jobs, machine, plain, suite, timing
from .jobs import Job
from .suite import Settings

NAME = "end2end"
BASE, OURS, AUTO = "plain", "purify", "purify (alpha auto)"
CLEAN, ATTACK = "clean_accuracy", "attack_success"
# A difference of so many standard errors, or of so much, is none.
ERRORS, POINT = 3.0, 0.01
METHOD = {
    "job": "tune a backdoored model on clean images, then measure clean accuracy and attack "
    "success; plain: the official script's loop and evaluation; purify: purify and evaluate with "
    "the same published algorithm (alpha a number), all else as it comes",
    "right": "the mean over the seeds of clean accuracy, and that of attack success, differ from "
    f"plain's by at most {POINT:.0%} or {ERRORS:.0f} standard errors of the difference, "
    "sqrt((s1^2 + s2^2) / seeds), whichever is more",
    f"{AUTO}": "another algorithm, purify's default: for information, and not compared",
    "cold_us": "the variant's first run in this process (seed 0), which has trained the suspect or "
    "loaded it; the other times are those of the other seeds, variants in turn",
    "spread": "std: of a sample, over the seeds",
    "floor_us": "the products of convolutions and head at the best rate that torch.mm or one "
    "convolution reached here in the row's precision; bytes are left out of account",
}
SEEDS, QUICK_SEEDS = 5, 2


@dataclass(frozen=True)
class End2EndCase:
    """One named suspect.

    Attributes:
        data: folder of the training and test images, where the suspect needs one.
        folder: where trained suspects are kept.
        test_images: None takes the suspect's own number.
    """

    checkpoint: str
    data: Path | None = None
    folder: Path | None = None
    test_images: int | None = None
    seeds: int = SEEDS
    quick: bool = False
    op: ClassVar[str] = NAME

    def __str__(self) -> str:
        return f"{self.op}: {self.checkpoint}, {self.seeds} seeds"


@dataclass(frozen=True)
class Run:
    """One seed's job; seconds of tuning and of measuring."""

    tune: float
    evaluate: float
    clean_accuracy: float
    attack_success: float
    precision: str

    @property
    def seconds(self) -> float:
        return self.tune + self.evaluate


def _plain(job: Job, device: torch.device, seed: int) -> Run:
    spec, suspect, model = job.spec, job.suspect, copy.deepcopy(job.model)
    assert suspect.trigger is not None
    assert suspect.normalize is not None
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        # The seed is that of the order, crops and flips.
        torch.default_generator.manual_seed(seed)
        pictures = plain.Pictures(job.clean, suspect.normalize, spec.augment)
        plain.tune(
            model,
            model.head,  # type: ignore[arg-type]
            DataLoader(pictures, spec.order.batch_size, shuffle=True),
            device,
            alpha=spec.alpha,
            lr=jobs.LR,
            epochs=spec.epochs,
            seed=seed,
            syncs=True,
        )
    machine.wait(device)
    tuned = time.perf_counter()
    changes = (None, plain.pil_trigger(suspect.trigger))
    clean, attacked = (
        DataLoader(
            plain.Pictures(job.test, suspect.normalize, change=change), spec.order.batch_size
        )
        for change in changes
    )
    right, total = plain.counts(model, clean, device)
    hit, others = plain.counts(model, attacked, device, suspect.target)
    ended = time.perf_counter()
    return Run(tuned - started, ended - tuned, right / total, hit / others, "fp32")


def _purified(alpha: str | None = None) -> Callable[[Job, torch.device, int], Run]:
    def run(job: Job, device: torch.device, seed: int) -> Run:
        spec = job.spec
        started = time.perf_counter()
        loader = DeviceLoader(
            job.clean.images,
            job.clean.labels,
            spec.order.batch_size,
            device=device,
            seed=seed,
            augment=spec.augment,
            normalize=job.suspect.normalize,
        )
        result = purify(
            job.model,
            loader,
            alpha=spec.alpha if alpha is None else alpha,
            epochs=spec.epochs,
            lr=jobs.LR,
            device=device,
            seed=seed,
            progress=False,
            check=False,
        )
        machine.wait(device)
        tuned = time.perf_counter()
        found = _measured(result.model, job, device)
        ended = time.perf_counter()
        precision = str(result.settings["precision"])
        return Run(tuned - started, ended - tuned, *found, precision)

    return run


def _measured(model: nn.Module, job: Job, device: torch.device) -> tuple[float, float]:
    found = measure_attack(model, job.test, job.suspect, device)
    assert found.attack_success is not None
    return found.clean_accuracy, found.attack_success


VARIANTS: dict[str, Callable[[Job, torch.device, int], Run]] = {
    BASE: _plain,
    OURS: _purified(),
    AUTO: _purified("auto"),
}


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure every suspect; returns the record."""
    return suite.run(
        NAME, METHOD, settings, lambda case, rates: measure_case(case, rates, settings), say
    )


def measure_case(
    case: End2EndCase, rates: Mapping[str, float], settings: Settings
) -> dict[str, Any]:
    """Do the job with every variant and seed, in turn; refuse what ends elsewhere than plain."""
    device = settings.device
    job = jobs.make(
        case.checkpoint,
        device,
        data=case.data,
        folder=case.folder,
        test_images=case.test_images,
        quick=case.quick,
    )
    spec = job.spec
    before = _measured(job.model, job, device)
    rows = _rows(job, _runs(job, case.seeds, settings), rates)
    return {
        "floor": flops.floor(_flops(job, BASE), rates, "fp32"),
        "op": case.op,
        "family": case.checkpoint,
        "shape": [len(job.clean), spec.epochs, len(job.test)],
        "dtype": "fp32",
        "made": job.made,
        "alpha": spec.alpha,
        "lr": jobs.LR,
        "batch": spec.order.batch_size,
        "seeds": case.seeds,
        "before": {CLEAN: before[0], ATTACK: before[1]},
        "variants": [row for row in rows if row["reason"] is None],
        # Without their times.
        "refused": [
            {key: row[key] for key in ("variant", "ours", "reason", CLEAN, ATTACK)}
            for row in rows
            if row["reason"] is not None
        ],
    }


def _runs(job: Job, seeds: int, settings: Settings) -> dict[str, list[Run]]:
    """Every variant with every seed; who starts changes from seed to seed."""
    names = [n for n in VARIANTS if settings.variants is None or n in (BASE, *settings.variants)]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for seed in range(seeds):
        first = seed % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(VARIANTS[name](job, settings.device, seed))
    return runs


def _rows(
    job: Job, runs: Mapping[str, list[Run]], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    blocks = {name: [([r.seconds], None) for r in found[1:]] for name, found in runs.items()}
    return [
        {
            "variant": name,
            "ours": name != BASE,
            "reason": None if name == AUTO else apart(found, runs[BASE]),
            **timing.against(blocks, name, BASE),
            **summary(found),
            "floor_us": flops.microseconds(_flops(job, name), rates, found[0].precision),
        }
        for name, found in runs.items()
    ]


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Sum up one variant's runs, the first of them cold."""
    return {
        "cold_us": 1e6 * runs[0].seconds,
        "tune_us": 1e6 * statistics.median(r.tune for r in runs[1:]),
        "evaluate_us": 1e6 * statistics.median(r.evaluate for r in runs[1:]),
        "how": {"precision": runs[0].precision},
        CLEAN: _spread([r.clean_accuracy for r in runs]),
        ATTACK: _spread([r.attack_success for r in runs]),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values),
        "values": values,
    }


def apart(runs: Sequence[Run], base: Sequence[Run]) -> str | None:
    """Say how the results differ from the baseline's beyond the noise, or None."""
    wrong = []
    for name in (CLEAN, ATTACK):
        ours, theirs = ([getattr(r, name) for r in part] for part in (runs, base))
        difference = statistics.fmean(ours) - statistics.fmean(theirs)
        error = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / len(ours))
        # The bound is not tested by ">": a NaN is wrong.
        if not abs(difference) <= max(POINT, ERRORS * error):
            wrong.append(
                f"{name} is {statistics.fmean(ours):.1%}, plain's {statistics.fmean(theirs):.1%}, "
                f"with a standard error of {error:.1%}"
            )
    return "; ".join(wrong) or None


def _flops(job: Job, name: str) -> int:
    image, spec = flops.per_image(job.model, job.test.images.shape[1]), job.spec
    measuring = 2 * image.forward * len(job.test)
    if name != AUTO:
        return image.training * len(job.clean) * spec.epochs + measuring
    method = TriggerUnlearning()
    epochs = spec.epochs * method.epochs_factor
    # A search asks for the images' gradients, not for the weights'.
    searching = method.search_images(epochs, len(job.clean.classes)) * 2 * image.forward
    return image.training * len(job.clean) * epochs + searching + measuring
