"""Records the device's work of a step once, as a CUDA graph, and replays it from then on."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

# First calls look up algorithms, load kernels and make workspaces, which no graph can hold.
WARM_UPS = 2
# Each graph keeps its kernels and addresses: batches of ever new sizes run as they are.
MOST_GRAPHS = 8

Function = Callable[[], None]


class Capture(Protocol):
    """What records: CUDA, or in tests something that does as CUDA does."""

    def warm_up(self, function: Function) -> None:
        """Call it once, where it will be recorded."""

    def record(self, function: Function) -> Function:
        """Call it; returns what does the same device work again, on the same memory."""


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
        # Threads that load data go on meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            function()
        return graph.replay


def capture_for(device: torch.device) -> Capture | None:
    """What records on this device; None where nothing does."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return CudaGraphs(device)


class Replays:
    """Runs steps of a few kinds: each is recorded when it first comes, and replayed then.

    One that cannot be recorded is run as it is, and so is every further kind: the model does
    something that no graph can hold, or the memory does not suffice for a second copy of it.

    Args:
        model: whose Python side is watched: what it counts or draws there would stand still.
        capture: None records nothing.
        state: all tensors that a step changes; warming up leaves them as they were.
        device: whose random numbers a step may draw.
        refused: called once with the reason, where a step cannot be recorded.
        watches_draws: whether nobody but the model draws random numbers meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        capture: Capture | None,
        state: Callable[[], list[Tensor]],
        device: torch.device,
        refused: Callable[[str], None],
        watches_draws: bool = True,
    ) -> None:
        self._model, self._capture, self._state = model, capture, state
        self._device, self._refused = device, refused
        self._watches_draws = watches_draws
        self._ready: dict[Hashable, Function] = {}

    def run(self, kind: Hashable, function: Function) -> None:
        """Do the device work of ``function``, which must be the same for all calls of a kind."""
        replay = self._ready.get(kind)
        if replay is None and self._capture is not None and len(self._ready) < MOST_GRAPHS:
            replay = self._recorded(self._capture, function)
            if replay is None:
                self._capture = None
            else:
                self._ready[kind] = replay
        (replay or function)()

    def _recorded(self, capture: Capture, function: Function) -> Function | None:
        reason = replay = None
        state = self._state()
        kept = [tensor.clone() for tensor in state]
        with self._without_trace() as moved:
            try:
                for _ in range(WARM_UPS):
                    capture.warm_up(function)
                    # Each time from the same state: a batch's place in its table is part of it.
                    _put_back(state, kept)
                reason = moved()
                if reason is None:
                    replay = capture.record(function)
            except (RuntimeError, NotImplementedError) as error:
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            finally:
                _put_back(state, kept)
        if reason is not None:
            self._refused(reason)
        return replay

    @contextmanager
    def _without_trace(self) -> Iterator[Callable[[], str | None]]:
        """Random states and the model's plain values end as they were.

        Yields what tells why steps so far would not be the same when replayed, or None.
        """
        values = _plain_values(self._model)
        with _draws_put_back(self._device, self._watches_draws) as drawn:

            def moved() -> str | None:
                for module, before in values.items():
                    for name, value in vars(module).items():
                        if name in before and before[name] != value:
                            return f"{type(module).__name__}.{name} changes in Python at every step"
                return drawn()

            try:
                yield moved
            finally:
                for module, before in values.items():
                    vars(module).update(before)


@torch.no_grad()
def _put_back(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _plain_values(model: nn.Module) -> dict[nn.Module, dict[str, object]]:
    plain = (bool, int, float, str)
    return {
        module: {name: value for name, value in vars(module).items() if isinstance(value, plain)}
        for module in model.modules()
    }


@contextmanager
def _draws_put_back(device: torch.device, host: bool) -> Iterator[Callable[[], str | None]]:
    """Random states end as they were; the host's only where ``host``.

    Yields what tells from which of the host's numbers were drawn, or None. A device that is the
    CPU may draw from torch's.
    """
    on_gpu = device.type == "cuda"
    own = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
    before = _host_draws(on_gpu)

    def drawn() -> str | None:
        after = _host_draws(on_gpu)
        moved = [name for name in before if before[name] != after[name]]
        return f"the model draws random numbers from {moved[0]}" if host and moved else None

    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    host_state = torch.get_rng_state()
    try:
        yield drawn
    finally:
        if on_gpu:
            torch.cuda.set_rng_state(own, device)
        else:
            torch.set_rng_state(own)
        if host:
            random.setstate(state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            torch.set_rng_state(host_state)


def _host_draws(with_torch: bool) -> dict[str, object]:
    kind, key, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    out: dict[str, object] = {
        "random": random.getstate(),
        "numpy.random": (kind, np.asarray(key).tobytes(), *rest),
    }
    if with_torch:
        out["torch's generator on the CPU"] = torch.get_rng_state().numpy().tobytes()
    return out
