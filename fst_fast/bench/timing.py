"""Times variants in turn, in one process, over inputs that rotate."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
BLOCK_SECONDS = 0.005
# Calls that take longer are not made once more for that.
LEAD_SECONDS = 0.5
MOST_CALLS = 64
LEAST_ROUNDS, MOST_ROUNDS = 3, 200
# A graph of few short calls would measure its own launch.
GRAPH_CALLS, SHORT_SECONDS = 200, 1e-3


# Samples in seconds, and what the host spent on each call, or None.
Block = tuple[list[float], float | None]


class Timer(Protocol):
    """Runs a few calls of one variant in a block, which takes about ``seconds``."""

    seconds: float

    def block(self) -> Block: ...


class HostTimer:
    """Each call timed by itself, on the CPU.

    Args:
        expected: seconds that a call takes; None finds out.
    """

    def __init__(self, calls: Sequence[Call], expected: float | None = None) -> None:
        self._calls = itertools.cycle(calls)
        one = expected or min(self._timed() for _ in range(2))
        # An untimed call leads each block: another variant ran just before, and has left the caches
        # and the free memory as it pleased.
        self._lead = one < LEAD_SECONDS
        self._count = max(1, min(MOST_CALLS, int(BLOCK_SECONDS / one)))
        self.seconds = one * (self._count + self._lead)

    def _timed(self) -> float:
        call = next(self._calls)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def block(self) -> Block:
        if self._lead:
            next(self._calls)()
        return [self._timed() for _ in range(self._count)], None


class EventTimer:
    """Calls between two CUDA events; a sample is their mean.

    Args:
        expected: seconds that a call takes; None, or what is short, finds out.
    """

    def __init__(self, calls: Sequence[Call], expected: float | None = None) -> None:
        self._calls = itertools.cycle(calls)
        self._count = 1
        if expected is None or expected < LEAD_SECONDS:
            expected = min(self._run()[0] for _ in range(2))
        self.call_seconds = expected
        self._count = max(1, min(MOST_CALLS, int(BLOCK_SECONDS / self.call_seconds)))
        self.seconds = self.call_seconds * self._count

    def _run(self) -> tuple[float, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        start = time.perf_counter()
        for _ in range(self._count):
            next(self._calls)()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self._count, host / self._count

    def block(self) -> Block:
        device, host = self._run()
        return [device], host


class GraphTimer:
    """Replays of one CUDA graph that holds a call for each of the inputs, or several.

    ``host`` is one replay's launch, shared out among the calls in it.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        short = EventTimer(calls).call_seconds < SHORT_SECONDS
        self._count = len(calls) * (math.ceil(GRAPH_CALLS / len(calls)) if short else 1)
        self._graph = capture([calls[i % len(calls)] for i in range(self._count)])
        self._replay = EventTimer([self._graph.replay])
        self.seconds = self._replay.seconds

    def block(self) -> Block:
        samples, host = self._replay.block()
        return [s / self._count for s in samples], host and host / self._count


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """The calls, each already warm, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def interleave(timers: Mapping[str, Timer], seconds: float) -> dict[str, list[Block]]:
    """Blocks of every variant in rounds; who starts changes from round to round."""
    total = sum(timer.seconds for timer in timers.values())
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / total)))
    names = list(timers)
    out: dict[str, list[Block]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                out[name].append(timers[name].block())
    finally:
        gc.enable()
    return out


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` in 0..1 of the values lie, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(blocks: Sequence[Block]) -> dict[str, Any]:
    """Percentiles in microseconds."""
    samples = [sample for block, _ in blocks for sample in block]
    host = [seconds for _, seconds in blocks if seconds is not None]
    p20, p50, p80 = (percentile(samples, share) * 1e6 for share in (0.2, 0.5, 0.8))
    return {
        "p20_us": p20,
        "p50_us": p50,
        "p80_us": p80,
        "host_p50_us": percentile(host, 0.5) * 1e6 if host else None,
        "samples": len(samples),
        "rounds": len(blocks),
    }


def against(blocks: Mapping[str, Sequence[Block]], name: str, *bases: str) -> dict[str, Any]:
    """:func:`summarise` of a variant, and its :func:`speedup` over each of the bases there are."""
    out = summarise(blocks[name])
    for base in bases:
        if base in blocks:
            ratio, between = speedup(blocks[name], blocks[base])
            out |= {f"speedup_over_{base}": ratio, f"speedup_range_{base}": between}
    return out


def speedup(blocks: Sequence[Block], base: Sequence[Block]) -> tuple[float, list[float]]:
    """Return how many times as fast as the baseline: the ratio of medians, and its range.

    The range holds p20 and p80 of that ratio taken round by round: on a busy machine it tells
    more than the percentiles of the times.
    """
    ours, theirs = ([s for block, _ in part for s in block] for part in (blocks, base))
    by_round = [
        percentile(those, 0.5) / percentile(these, 0.5)
        for (these, _), (those, _) in zip(blocks, base, strict=True)
    ]
    ratio = percentile(theirs, 0.5) / percentile(ours, 0.5)
    return ratio, [percentile(by_round, share) for share in (0.2, 0.8)]
