"""The suite ``head``: head_deviation_loss forward and backward, and head_step_."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from . import cases, errors, machine, memory, peers, suite, timing
from .suite import Checked, Facts, Settings

NAME = "head"
MOST_INPUTS = 256
# On a CPU a call of a huge case that takes longer than so many of eager's is not timed.
PATIENCE = 2.0
METHOD = {
    "error": "largest deviation from float64 as a share of the largest true value; in huge cases "
    f"of d_features and d_weight {cases.CHECKED_ROWS} rows each are compared",
    "right": "at most twice eager's own error and one rounding; ours is not timed otherwise",
    "speedup": "eager's median / the variant's; range: p20 and p80 of that ratio round by round",
    "floor": "flops at torch.mm's best rate here, or bytes at copy_'s best rate, the larger",
    "hot": "the same with one set of inputs, where that fits into the last-level cache",
    "inputs": "sets in turn, together at least 3 times the last-level cache where "
    f"{MOST_INPUTS} sets are enough",
}


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure everything; returns the record."""
    method = {**METHOD, "memory": memory.METHOD[settings.device.type]}
    with memory.Child() as child:
        return suite.run(
            NAME,
            method,
            settings,
            lambda case, rates: {
                "floor": cases.floor(case, rates),
                **measure_case(case, settings, child),
            },
            say,
        )


def measure_case(case: cases.Case, settings: Settings, child: memory.Child) -> dict[str, Any]:
    """Check every variant, then time those that may be timed, then their memory."""
    found = peers.variants(case, settings.device, settings.variants)
    right, refused = checked(case, found, settings.device)
    if case.huge and settings.device.type == "cpu" and settings.variants is None:
        right, slow = without_the_slow(right)
        refused |= slow
    sets = make_sets(case, settings.device)
    cold = _time(case, right, sets, settings)
    # A case that fits into the cache is also timed there.
    fits = case.bytes <= machine.cache_bytes(settings.device)
    hot = _time(case, right, sets[:1], settings) if fits else None
    count = len(sets)
    # The child needs the room.
    del sets
    gc.collect()
    rows = []
    for variant, facts in right.items():
        row = facts.row(variant) | _against_eager(cold, variant.name)
        row["hot"] = hot and _against_eager(hot, variant.name)
        rows.append(row | _memory(case, variant, settings.device, child))
    return {
        **cases.describe(case),
        "huge": case.huge,
        "input_sets": count,
        "input_bytes": count * case.bytes,
        "yardstick_bytes": case.yardstick_bytes,
        **suite.sides(rows, refused, found),
    }


def _against_eager(blocks: dict[str, list[timing.Block]], name: str) -> dict[str, Any]:
    ratio, between = timing.speedup(blocks[name], blocks["eager"])
    times = timing.summarise(blocks[name])
    return {**times, "speedup_over_eager": ratio, "speedup_range": between}


def _time(
    case: cases.Case, right: Checked, sets: list[Any], settings: Settings
) -> dict[str, list[timing.Block]]:
    # A huge case is not run twice more to see how long it takes.
    expected = {variant: facts.seconds if case.huge else None for variant, facts in right.items()}
    return suite.time_in_turn(expected, sets, settings)


def make_sets(case: cases.Case, device: torch.device) -> list[Any]:
    """Inputs enough that none is still in the cache when its turn comes again."""
    count = -(-3 * machine.cache_bytes(device) // case.bytes)
    return [
        case.make_inputs(seed, device) for seed in range(1, 1 + max(2, min(count, MOST_INPUTS)))
    ]


def checked(
    case: cases.Case, found: list[peers.Variant], device: torch.device
) -> tuple[Checked, Checked]:
    """Run each variant once: those that may be timed, and those refused.

    Others' variants are timed even where they are worse than eager allows; ``reason`` then says so.
    """
    inputs: Any = case.make_inputs(0, device)
    truth = case.truth(inputs)
    eager: dict[str, float] | None = None

    def check(variant: peers.Variant) -> Facts:
        nonlocal eager
        start = time.perf_counter()
        try:
            got = run_once(case, variant, inputs, device)
            seconds = time.perf_counter() - start
            found = errors.of(got, truth)
            if variant.name == "eager":
                reason = errors.verdict(got, found, found)
                eager = found if reason is None else None
            elif eager is None:
                reason = "eager failed, so that there is no measure for it"
            else:
                reason = errors.verdict(got, found, eager)
            return Facts(reason, seconds, {"errors": found})
        finally:
            case.clear(inputs)

    facts = suite.check_each(found, check)
    shown = {v: f for v, f in facts.items() if f.reason is None or (_shown(v, f) and eager)}
    return shown, {v: f for v, f in facts.items() if v not in shown}


def _shown(variant: peers.Variant, facts: Facts) -> bool:
    """Return whether another's result that is wrong is to be timed all the same."""
    return not variant.ours and "errors" in facts.told


def without_the_slow(right: Checked) -> tuple[Checked, Checked]:
    """Parts from those to time the ones of others that would cost minutes and come in last."""
    eager = next((facts.seconds for v, facts in right.items() if v.name == "eager"), 0.0)
    keep: Checked = {}
    slow: Checked = {}
    for variant, facts in right.items():
        if variant.ours or facts.seconds <= PATIENCE * eager:
            keep[variant] = facts
        else:
            reason = f"one call took {facts.seconds:.1f} s, eager's {eager:.1f} s; not timed again"
            slow[variant] = replace(facts, reason=reason)
    return keep, slow


def run_once(
    case: cases.Case, variant: peers.Variant, inputs: Any, device: torch.device
) -> dict[str, torch.Tensor | None]:
    """The results of one call on a copy of the inputs."""
    copy: Any = case.copy(inputs)
    call = variant.make(copy)
    if not variant.graph:
        with warnings.catch_warnings():
            # Inductor warns of a GPU's matrix modes, once per process.
            warnings.simplefilter("ignore")
            return case.results(copy, call())
    returned: list[Any] = []
    # Warm on other inputs: one call may step in place, and the copy must see exactly one.
    variant.make(case.make_inputs(1, device))()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        returned.append(call())
    results = case.results(copy, returned[0])
    graph.replay()
    torch.cuda.synchronize()
    return {name: t if t is None else t.clone() for name, t in results.items()}


def _memory(
    case: cases.Case, variant: peers.Variant, device: torch.device, child: memory.Child
) -> dict[str, Any]:
    try:
        if device.type == "cuda":
            peak, kept = memory.cuda_peak(case, variant, case.make_inputs(0, device)), None
        else:
            peak, kept = child.peak(case, variant.name, torch.get_num_threads())
    except (RuntimeError, OSError) as error:
        return {"peak_extra_bytes": None, "extra_share": None, "memory_note": str(error)}
    share = peak / case.yardstick_bytes
    return {"peak_extra_bytes": peak, "kept_bytes": kept, "extra_share": share}
