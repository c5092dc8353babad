"""Records the device's work of steps once, as CUDA graphs, and replays it from then on."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .dry_run import without_trace

# First calls look up algorithms, load kernels and make workspaces, which no graph can hold.
WARM_UPS = 2
# Each graph keeps its kernels and addresses: batches of ever new sizes run as they are.
MOST_GRAPHS = 8
# In one graph: behind it the host hears of a fault and of Ctrl-C.
MOST_STEPS = 16
# What a step in a graph of several is spared: about the launch of one.
LAUNCH_SECONDS = 10e-6
# A launch is too small a share of such a step to be seen.
LONG_STEP_SECONDS = 20 * LAUNCH_SECONDS

Function = Callable[[], None]


class Capture(Protocol):
    """What records: CUDA, or in tests something that does as CUDA does."""

    def warm_up(self, function: Function) -> None:
        """Call it once, where it will be recorded."""

    def record(self, function: Function) -> Function:
        """Call it; returns what does the same device work again, on the same memory."""

    def seconds(self, replay: Function) -> float:
        """Call what :meth:`record` returned; how long the device took."""


class CudaGraphs:
    """Graphs on one device that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Function) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def record(self, function: Function) -> Function:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        causes: list[Exception] = []
        try:
            with (
                # To come back to: a recording that fails would leave its own.
                torch.cuda.stream(current),
                # Threads that load data go on meanwhile.
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    function()
                except Exception as error:
                    causes.append(error)
                    raise
        except Exception as error:
            self._draw_again()
            # The end of a spoiled recording raises too, and hides what spoiled it.
            raise causes[0] if causes else error from None
        return graph.replay

    def _draw_again(self) -> None:
        """Random numbers in the way of a device, after a recording that has failed.

        The generator would wait for ever for the recording's end, and refuse to draw meanwhile.
        """
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        fresh = torch.Generator(generator.device)
        fresh.set_state(generator.get_state())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())

    def seconds(self, replay: Function) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            start.record()
            replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def capture_for(device: torch.device) -> Capture | None:
    """What records on this device; None where nothing does."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return CudaGraphs(device)


@dataclass(frozen=True)
class Recording:
    """Whether and how a run's steps are recorded.

    Attributes:
        capture: what records; None runs them as they are.
        required: a step that cannot be recorded is an error.
        most_steps: in one graph; None goes by what they take.
    """

    capture: Capture | None = None
    required: bool = False
    most_steps: int | None = None


@dataclass(frozen=True)
class _Graph:
    """What replays a recording, and how long it took to make, in seconds."""

    replay: Function
    seconds: float


def steps_worth_it(recording_seconds: float, left: int) -> int:
    """How many steps one graph may hold at most, so that it takes no more than it saves.

    Args:
        recording_seconds: of one step: those of n take n times as long.
        left: steps that there still are, each of which is spared a launch.
    """
    return max(1, min(MOST_STEPS, int(left * LAUNCH_SECONDS / recording_seconds)))


def steps_in_one(in_a_row: int, most: int) -> int:
    """So many, at most ``most``, that the launches for steps in a row are fewest.

    What they leave over goes one by one: of 19 steps 9 + 9 + 1 rather than 16 + 1 + 1 + 1.
    """
    return min(range(1, most + 1), key=lambda steps: in_a_row // steps + in_a_row % steps)


class Replays:
    """Runs steps of a few kinds: each is recorded when it first comes, and replayed then.

    One that cannot be recorded is run as it is, and so is every further kind: the model does
    something that no graph can hold, or the memory does not suffice for a second copy of it.
    Several steps that follow one another without the host may become one graph.

    Args:
        model: whose Python side is watched: what it counts or draws there would stand still.
        recording: whether and how they are recorded.
        state: all tensors that a step changes; recording leaves them as they were.
        device: whose random numbers a step may draw.
        refused: called with the reason and the number of steps, where they cannot be recorded:
            once with one step, and once for each kind with several, which then goes one by one.
        watches_draws: whether nobody but the model draws random numbers meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        recording: Recording,
        state: Callable[[], list[Tensor]],
        device: torch.device,
        refused: Callable[[str, int], None],
        watches_draws: bool = True,
    ) -> None:
        self._model, self._state, self._device = model, state, device
        self._capture, self._most_steps = recording.capture, recording.most_steps
        self._refused, self._watches_draws = refused, watches_draws
        self._ready: dict[Hashable, _Graph] = {}
        self._several: dict[Hashable, tuple[int, Function]] = {}

    @property
    def longest(self) -> int:
        """Steps in the graph that holds most; 0 where nothing was recorded."""
        return max([int(bool(self._ready)), *(steps for steps, _ in self._several.values())])

    def run(self, kind: Hashable, function: Function, in_a_row: int = 1, left: int = 1) -> int:
        """Do the device work of ``function`` once, or several times where that is one graph.

        Args:
            kind: the work must be the same for all calls of one.
            in_a_row: how often it may be done now.
            left: how often it will have to be done until the run ends, about.
        Returns:
            How often it was done.
        """
        one = self._ready.get(kind) or self._first(kind, function)
        if one is None:
            function()
            return 1
        if in_a_row > 1 and kind not in self._several:
            self._several[kind] = self._together(one, function, in_a_row, left)
        steps, replay = self._several.get(kind, (1, one.replay))
        if steps > in_a_row:
            steps, replay = 1, one.replay
        replay()
        return steps

    def _first(self, kind: Hashable, function: Function) -> _Graph | None:
        if self._capture is None or len(self._ready) == MOST_GRAPHS:
            return None
        graph = self._recorded(self._capture, function, WARM_UPS)
        if isinstance(graph, str):
            self._capture = None
            self._refused(graph, 1)
            return None
        self._ready[kind] = graph
        return graph

    def _together(
        self, one: _Graph, function: Function, in_a_row: int, left: int
    ) -> tuple[int, Function]:
        """How many steps of a kind are one graph, and that graph."""
        alone = (1, one.replay)
        if self._capture is None:
            return alone
        steps = steps_in_one(in_a_row, self._most_steps or steps_worth_it(one.seconds, left))
        if steps == 1:
            return alone
        if not self._most_steps and self._seconds(self._capture, one) > LONG_STEP_SECONDS:
            return alone

        def several() -> None:
            for _ in range(steps):
                function()

        graph = self._recorded(self._capture, several, 0)
        if isinstance(graph, str):
            self._refused(graph, steps)
            return alone
        return steps, graph.replay

    def _recorded(self, capture: Capture, function: Function, warm_ups: int) -> _Graph | str:
        """The recording, or why there can be none."""
        try:
            with self._rehearsed() as (moved, put_back):
                for _ in range(warm_ups):
                    capture.warm_up(function)
                    # Each time from the same state: a batch's place in its table is part of it.
                    put_back()
                reason = moved()
                if reason is not None:
                    return reason
                started = time.perf_counter()
                replay = capture.record(function)
                return _Graph(replay, time.perf_counter() - started)
        except (RuntimeError, NotImplementedError) as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    def _seconds(self, capture: Capture, graph: _Graph) -> float:
        """Of a replay on the device; the first one, of two at least to come, moves it there."""
        with self._rehearsed():
            capture.seconds(graph.replay)
            return capture.seconds(graph.replay)

    def _rehearsed(self) -> AbstractContextManager[tuple[Callable[[], str | None], Function]]:
        return without_trace(self._model, self._state(), self._device, self._watches_draws)
