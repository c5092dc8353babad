"""The suites ``loop`` and ``evaluate``: the ladder from the official script's way to ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from . import flops, ladder, machine, overhead, peers, suite, timing
from .ladder import BASE, OURS, Ended, Rung
from .loop_cases import Inputs, LoopCase
from .suite import Checked, Facts, Settings

METHOD = {
    "model": "ResNet-18 in its CIFAR form, random weights; an image's mean colour tells its class",
    "rungs": "each adds one change to the one above; plain is the official script's loop, the "
    "last is fst_fast as it comes",
    "right": "loop: after an epoch without crop, flip and shuffling, the head, as a share of its "
    "norm, and the loss are within 2 % (half precision: 10 %) of plain's; evaluate: the shares are "
    "plain's, to half a percent (half precision: one percent)",
    "speedup": "plain's median / the rung's; range: p20 and p80 of that ratio by round",
    "cold_us": "the rung's first run in this process, a trial of arrangements and what is compiled "
    "or captured included; the rungs above it have run before",
    "floor_us": "the products of convolutions and head at the best rate that torch.mm or one "
    "convolution reached here in the row's precision; bytes are left out of account",
    "overhead": "of the last rung. CPU: its steps on one batch, from that batch to the request for "
    "the next, each behind a bare forward and backward pass on it; share = the median of (step - "
    "pass) over the median step. GPU: the mean step behind the first epoch, and the median replay "
    "of a CUDA graph of forward, cross-entropy, backward and fused SGD alone; share = (step - "
    "pass) / step",
    "shares": "of the wall clock of a few profiled steps, each op's own time; on a GPU, each "
    "kernel's",
}


def run(name: str, settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure the suite ``name``; returns the record."""
    return suite.run(
        name, METHOD, settings, lambda case, rates: measure_case(case, rates, settings), say
    )


def measure_case(case: LoopCase, rates: Mapping[str, float], settings: Settings) -> dict[str, Any]:
    """Check every rung against plain, then time those that are right."""
    inputs = case.make_inputs(settings.device)
    wanted = [
        r
        for r in ladder.RUNGS[case.op](settings.device)
        if settings.variants is None or r.name in (BASE, *settings.variants)
    ]
    facts = checked(case, wanted, inputs)
    right = {rung: found for rung, found in facts.items() if found.reason is None}
    return {
        "floor": flops.floor(case.flops, rates, case.dtype),
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "variants": _timed(case, right, inputs, rates, settings),
        "refused": [f.row(rung) for rung, f in facts.items() if rung not in right],
        **(_looked_into(case, right, inputs) if case.op == "loop" else {}),
    }


def _timed(
    case: LoopCase,
    right: Checked,
    inputs: Inputs,
    rates: Mapping[str, float],
    settings: Settings,
) -> list[dict[str, Any]]:
    """A row for each rung."""
    # The times are known, so nothing is run twice more to see how long it takes.
    expected: dict[peers.Variant, float | None] = {r: found.seconds for r, found in right.items()}
    blocks = suite.time_in_turn(expected, [(inputs, case)], settings)
    return [
        {
            **found.row(rung),
            **timing.against(blocks, rung.name, BASE),
            "cold_us": 1e6 * found.seconds,
            "floor_us": flops.microseconds(case.flops, rates, found.told["how"]["precision"]),
        }
        for rung, found in right.items()
    ]


def checked(case: LoopCase, rungs: list[Rung], inputs: Inputs) -> Checked:
    """Run each rung once as it is timed, and once so that its result can be compared.

    Raises:
        ValueError, RuntimeError: plain itself fails; of another rung that is a finding.
    """
    truth: Ended | None = None

    def check(rung: Rung) -> Facts:
        nonlocal truth
        machine.wait(inputs.device)
        started = time.perf_counter()
        first = rung.run(inputs, case, True, {})
        machine.wait(inputs.device)
        seconds = time.perf_counter() - started
        found = rung.run(inputs, replace(case, epochs=1), False, first.how)
        truth = truth or found
        reason = ladder.JUDGES[case.op](found, truth, inputs)
        return Facts(reason, seconds, {"how": dict(first.how)})

    out = suite.check_each(rungs, check)
    if truth is None:
        raise RuntimeError(f"{BASE}: {next(iter(out.values())).reason}")
    return out


def _looked_into(case: LoopCase, right: Checked, inputs: Inputs) -> dict[str, Any]:
    """Say where the time of steps goes, of plain and of purify as it comes."""
    out: dict[str, Any] = {"shares": {}, "overhead": None}
    for rung, found in right.items():
        if rung.name in (BASE, OURS):
            out["shares"][rung.name] = overhead.shares(rung, inputs, case, found.told["how"])
        if rung.name == OURS:
            out["overhead"] = overhead.overhead(rung, inputs, case, found.told["how"])
    return out
