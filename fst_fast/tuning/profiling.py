"""Shows where a run's time goes: a Chrome trace of a few steps, and shares by kind of work."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import FunctionEvent

from ..data.batches import Loader

STEPS = 10
_LOADER = "fst_fast: next batch"
# The first pattern that an event's name, or else that of the nearest event around it, matches. On a
# GPU these are names of kernels.
GROUPS = {
    "loader": re.compile(rf"{_LOADER}|DataLoader|inject", re.I),
    "optimizer": re.compile(r"Optimizer\.|sgd|head_step|multi_tensor_apply"),
    "convolutions": re.compile(r"conv|fprop|wgrad|dgrad|gemm|winograd|nchwToNhwc|nhwcToNchw", re.I),
    "batch norm": re.compile(r"batch_?norm|bn_(fw|bw)", re.I),
    "head": re.compile(
        r"head_deviation|addmm|AddmmBackward|linear|log_softmax|LogSoftmax|nll_loss|NllLoss",
        re.I,
    ),
    "activations": re.compile(r"relu|threshold|clamp_min", re.I),
}
REST, OUTSIDE = "other ops", "between ops"


class StepProfile:
    """A loader that has a few steps of the run over it profiled.

    Yields what the loader yields; every other attribute is the loader's. A step begins with the
    request for its batch and ends with the next request.

    Args:
        loader: of the run.
        first: steps that pass before, at least 1.
        steps: that are profiled, or fewer where the run ends.
    """

    def __init__(self, loader: Loader, first: int, steps: int = STEPS) -> None:
        self.loader = loader
        self.first, self.last = first, first + steps
        self.steps = 0
        self.seconds = 0.0
        self._passed = 0
        self._profiler: torch.profiler.profile | None = None
        self._running = False
        self._started = 0.0

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling ask for attributes before there is a loader.
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader() if callable(self.loader) else self.loader)
        while True:
            with torch.profiler.record_function(_LOADER):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            # A batch that was only looked at, to check it, is not followed by another.
            self._passed += 1
            if self._running:
                self.steps += 1
                if self._passed == self.last:
                    self.stop()
            elif self._passed == self.first:
                self._start()

    def _start(self) -> None:
        wanted = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            wanted.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=wanted)
        self._profiler.start()
        self._running = True
        _wait()
        self._started = time.perf_counter()

    def stop(self) -> None:
        """End the profile, where the run has ended before its last step."""
        if self._running and self._profiler is not None:
            _wait()
            self.seconds = time.perf_counter() - self._started
            self._profiler.stop()
            self._running = False

    def shares(self) -> dict[str, float]:
        """The share of the steps' time in each of GROUPS, in other ops, and between ops.

        On a GPU the time of its kernels, where there were any. They sum to 1, but for kernels that
        run side by side.
        """
        assert self._profiler is not None
        return shares(self._profiler.events() or [], self.seconds)

    def save(self, path: Path) -> None:
        """Write the trace for chrome://tracing or ui.perfetto.dev; the shares to standard error.

        Raises:
            RuntimeError: the run ended before the first step that was to be profiled.
        """
        self.stop()
        if self._profiler is None or not self.steps:
            raise RuntimeError(
                f"--profile: the run must have more than {self.first + 1} steps, got "
                f"{self._passed}; nothing was profiled"
            )
        self._profiler.export_chrome_trace(str(path))
        table = Table("work", "ms per step", "share")
        for name, share in self.shares().items():
            ms = 1e3 * share * self.seconds / self.steps
            table.add_row(name, f"{ms:.2f}", f"{100 * share:.1f} %")
        console = Console(stderr=True)
        console.print(table, highlight=False)
        console.print(
            f"{self.steps} steps from step {self.first + 1}: {path}",
            highlight=False,
            soft_wrap=True,
        )


def of_run(loader: Loader, epochs: int, path: Path) -> StepProfile:
    """A profile of steps in the middle epoch of a run, where every part of it is at work.

    Raises:
        ValueError: ``path`` cannot be written to, or the loader does not tell its length.
    """
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--profile must name a file in a folder that exists, got {path}")
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            f"--profile: loader must tell its length, got {type(loader).__name__}"
        ) from None
    # It runs from the epoch's second step to its end, so that nothing between epochs is in it.
    return StepProfile(loader, epochs // 2 * length + 1, max(1, min(STEPS, length - 1)))


def shares(events: Any, seconds: float) -> dict[str, float]:
    """The events' own time by group, as shares of ``seconds``."""
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    totals = dict.fromkeys([*GROUPS, REST], 0.0)
    for event in kernels or events:
        own = event.device_time_total if kernels else event.self_cpu_time_total
        totals[_group(event)] += own / 1e6
    out = {name: total / seconds for name, total in totals.items()}
    return {**out, OUTSIDE: max(0.0, 1 - sum(out.values()))}


def _group(event: FunctionEvent) -> str:
    inner: FunctionEvent | None = event
    while inner is not None:
        for name, pattern in GROUPS.items():
            if pattern.search(inner.name):
                return name
        inner = inner.cpu_parent
    return REST


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
