"""Runs a suite: its record, its cases in turn, its variants in turn."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import machine, peers, records, timing

SCHEMA = 1
TIME_METHOD = {
    "time_cpu": "wall clock of single calls, in blocks of one variant, in turn",
    "time_cuda": "CUDA events around a block of calls, or around a graph of them; host_p50_us is "
    "the wall clock that launching took per call",
}


@dataclass(frozen=True)
class Settings:
    """Settings of a suite: what to measure, on what, for how long.

    Attributes:
        cases: of the suite's own kind.
        variants: names, those that ratios refer to being added; None takes all.
        seconds: for the rounds of one case.
        without: names of variants that are left out, baselines too.
        keep: called with the record so far after every case.
    """

    device: torch.device
    cases: Sequence[Any]
    threads: list[int]
    variants: list[str] | None = None
    seconds: float = 2.0
    quick: bool = False
    without: Collection[str] = ()
    keep: Callable[[Mapping[str, Any]], object] = lambda record: None


@dataclass(frozen=True)
class Facts:
    """The findings of one checked call of a variant.

    Attributes:
        reason: what is wrong with the result, or None.
        seconds: that it took, the first call's costs included.
        told: what its row in the record says beside that.
    """

    reason: str | None
    seconds: float = 0.0
    told: Mapping[str, Any] = field(default_factory=dict)

    def row(self, variant: peers.Variant) -> dict[str, Any]:
        return {"variant": variant.name, "ours": variant.ours, "reason": self.reason, **self.told}


Checked = dict[Any, Facts]


def check_each(found: Iterable[peers.Variant], check: Callable[[Any], Facts]) -> Checked:
    """Return what each variant's call shows, of those that can run."""
    peers.forget_compiled()
    out: Checked = {}
    for variant in found:
        if variant.obstacle is not None:
            continue
        start = time.perf_counter()
        try:
            facts = check(variant)
        # Whatever another's package raises is a finding, not the end of the run.
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            facts = Facts(f"{type(error).__name__}: {first}")
        out[variant] = replace(facts, seconds=facts.seconds or time.perf_counter() - start)
    return out


def sides(
    rows: Sequence[Mapping[str, Any]], refused: Checked, found: Iterable[peers.Variant]
) -> dict[str, Any]:
    """Return a case's part of the record: the rows, and why other variants have none."""
    return {
        "variants": rows,
        "refused": [facts.row(variant) for variant, facts in refused.items()],
        "left_out": {v.name: v.obstacle for v in found if v.obstacle is not None},
    }


def run(
    name: str,
    method: Mapping[str, str],
    settings: Settings,
    measure: Callable[[Any, Mapping[str, float]], dict[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure every case on every number of threads; returns the record.

    ``measure`` takes a case and the machine's rates, and returns what the record says of it.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    record: dict[str, Any] = {
        "suite": name,
        "schema": SCHEMA,
        "time": now.isoformat(timespec="seconds"),
        "date": now.date().isoformat(),
        **records.sources(),
        "device": machine.describe(settings.device),
        "versions": machine.versions(),
        "backends": machine.build(),
        "settings": {
            "variants": settings.variants,
            "seconds": settings.seconds,
            "quick": settings.quick,
        },
        "method": {**method, **TIME_METHOD},
        "load_average": {"before": machine.load_average()},
        "machine": [],
        "cases": [],
    }
    threads_before = torch.get_num_threads()
    try:
        for threads in settings.threads:
            torch.set_num_threads(threads)
            rates = machine.rates(settings.device, settings.quick)
            record["machine"].append({"threads": threads, **rates})
            for case in settings.cases:
                say(f"{case}, threads: {threads}")
                load = {"before": machine.load_average()}
                found = measure(case, rates)
                load["after"] = machine.load_average()
                record["cases"].append({"threads": threads, **found, "load_average": load})
                settings.keep(record)
    finally:
        torch.set_num_threads(threads_before)
    record["load_average"]["after"] = machine.load_average()
    return records.finish(record)


def time_in_turn(
    chosen: Mapping[peers.Variant, float | None], sets: Sequence[Any], settings: Settings
) -> dict[str, list[timing.Block]]:
    """Blocks of every variant, which stands with the seconds that a call takes, or None."""
    timers: dict[str, timing.Timer] = {}
    for variant, expected in chosen.items():
        calls = [variant.make(inputs) for inputs in sets]
        if variant.graph:
            timers[variant.name] = timing.GraphTimer(calls)
        elif settings.device.type == "cuda":
            timers[variant.name] = timing.EventTimer(calls, expected)
        else:
            timers[variant.name] = timing.HostTimer(calls, expected)
    return timing.interleave(timers, settings.seconds) if timers else {}
