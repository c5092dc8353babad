"""Records the device's work of steps once, as CUDA graphs, and replays it from then on."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .dry_run import watched, without_trace

# Each graph keeps its kernels and addresses: batches of ever new sizes run as they are.
MOST_GRAPHS = 8
# One graph holds at most so many steps: the host hears of a fault or Ctrl-C behind it.
MOST_STEPS = 16
# A step saves so many seconds when it shares a graph with others: about one launch.
LAUNCH_SECONDS = 10e-6
# A launch is too small a share of such a step to be seen.
LONG_STEP_SECONDS = 20 * LAUNCH_SECONDS

Function = Callable[[], None]


class Capture(Protocol):
    """Records device work: CUDA does, and in tests a stand-in that behaves like it.

    Attributes:
        executes: whether :meth:`record` does the work that it records, too.
    """

    executes: bool

    def warm_up(self, function: Function) -> None:
        """Call it once, where it will be recorded."""

    def record(self, function: Function) -> Function:
        """Call it; return what does the same device work again, on the same memory."""

    def seconds(self, replay: Function) -> float:
        """Call what :meth:`record` returned; return how long the device took."""


class CudaGraphs:
    """Graphs on one device that share one pool of memory."""

    executes = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The recording stream as the current one, in order with the stream outside."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def warm_up(self, function: Function) -> None:
        with self._aside():
            function()

    def record(self, function: Function) -> Function:
        try:
            return self._recorded(function)
        except torch.OutOfMemoryError:
            # The pool cannot grow into what the allocator keeps for later.
            torch.cuda.empty_cache()
            return self._recorded(function)

    def _recorded(self, function: Function) -> Function:
        # torch.cuda.graph would wait for the device and empty the allocator's cache first.
        graph = torch.cuda.CUDAGraph()
        cause: Exception | None = None
        with self._aside():
            # Threads that load data go on meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            except Exception as error:
                cause = error
            try:
                graph.capture_end()
            except Exception as error:
                # The end of a spoiled recording raises too, and hides what spoiled it.
                cause = cause or error
        if cause is not None:
            self._draw_again()
            raise cause
        return graph.replay

    def _draw_again(self) -> None:
        """Let the device draw random numbers after a recording that has failed.

        The generator would wait for ever for the recording's end, and refuse to draw meanwhile.
        """
        index = self._device.index
        generator = torch.cuda.default_generators[
            torch.cuda.current_device() if index is None else index
        ]
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
    """Return what records on this device; None where nothing does."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return CudaGraphs(device)


@dataclass(frozen=True)
class Recording:
    """Says whether and how a run's steps are recorded.

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
    """A recording as a function that replays it, and the seconds that it took to make."""

    replay: Function
    seconds: float


def steps_worth_it(recording_seconds: float, left: int) -> int:
    """Return the most steps that one graph may hold without taking more time than it saves.

    Args:
        recording_seconds: of one step: those of n take n times as long.
        left: steps that there still are, each of which is spared a launch.
    """
    return max(1, min(MOST_STEPS, int(left * LAUNCH_SECONDS / recording_seconds)))


def steps_in_one(in_a_row: int, most: int) -> int:
    """Return the number of steps, at most ``most``, that needs the fewest launches in a row.

    What they leave over goes one by one: of 19 steps 9 + 9 + 1 rather than 16 + 1 + 1 + 1.
    """
    return min(range(1, most + 1), key=lambda steps: in_a_row // steps + in_a_row % steps)


class Replays:
    """Runs steps of a few kinds: recorded the second time that one comes, and replayed then.

    The first step of a kind runs as it is, on the stream that will record: first calls look up
    algorithms, load kernels and make workspaces, which no graph can hold. A kind that comes once
    is never recorded. One that cannot be recorded is run as it is, and so is every further kind:
    the model does something that no graph can hold, or the memory does not suffice for a second
    copy of it. Several steps that follow one another without the host may become one graph.

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
        self._warm: set[Hashable] = set()
        self._ready: dict[Hashable, _Graph] = {}
        self._several: dict[Hashable, tuple[int, Function]] = {}

    @property
    def longest(self) -> int:
        """Steps in the graph that holds most; 0 where nothing was recorded."""
        return max([int(bool(self._ready)), *(steps for steps, _ in self._several.values())])

    def run(
        self, kind: Hashable, function: Function, ready: int = 1, in_a_row: int = 1, left: int = 1
    ) -> int:
        """Do the device work of ``function`` once, or several times where that is one graph.

        Args:
            kind: the work must be the same for all calls of one.
            ready: how often it may be done now.
            in_a_row: how often it may be done at once in a whole epoch, ``ready`` or more.
            left: how often it has to be done from the epoch's start to the run's end, about.
        Returns:
            How often it was done.
        """
        if kind not in self._warm and self._capture is not None:
            self._warm.add(kind)
            self._warm_up(self._capture, function)
            return 1
        one = self._ready.get(kind) or self._first(kind, function)
        if one is None:
            function()
            return 1
        # A whole epoch settles how many steps are one graph; if none is to come, those ready do.
        whole = ready == in_a_row or left <= in_a_row
        if ready > 1 and whole and kind not in self._several:
            self._several[kind] = self._together(one, function, ready, left)
        steps, replay = self._several.get(kind, (1, one.replay))
        if steps > ready:
            steps, replay = 1, one.replay
        replay()
        return steps

    def _warm_up(self, capture: Capture, function: Function) -> None:
        """Do a step of the run, and see whether it does all its work on the device."""
        with watched(self._model, self._device, self._watches_draws) as moved:
            capture.warm_up(function)
            reason = moved()
        if reason is not None:
            self._refuse(reason)

    def _refuse(self, reason: str) -> None:
        self._capture = None
        self._refused(reason, 1)

    def _first(self, kind: Hashable, function: Function) -> _Graph | None:
        if self._capture is None or len(self._ready) == MOST_GRAPHS:
            return None
        graph = self._recorded(self._capture, function)
        if isinstance(graph, str):
            self._refuse(graph)
            return None
        self._ready[kind] = graph
        return graph

    def _together(
        self, one: _Graph, function: Function, in_a_row: int, left: int
    ) -> tuple[int, Function]:
        """Return the number of steps of a kind in one graph, and that graph."""
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

        graph = self._recorded(self._capture, several)
        if isinstance(graph, str):
            self._refused(graph, steps)
            return alone
        return steps, graph.replay

    def _recorded(self, capture: Capture, function: Function) -> _Graph | str:
        """The recording, or why there can be none."""
        try:
            with without_trace(
                self._model,
                self._state() if capture.executes else [],
                self._device,
                self._watches_draws,
            ):
                started = time.perf_counter()
                replay = capture.record(function)
                return _Graph(replay, time.perf_counter() - started)
        except (RuntimeError, NotImplementedError) as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    def _seconds(self, capture: Capture, graph: _Graph) -> float:
        """Seconds of a replay on the device; the first one, of two at least, moves it there."""
        with without_trace(self._model, self._state(), self._device, self._watches_draws):
            capture.seconds(graph.replay)
            return capture.seconds(graph.replay)
