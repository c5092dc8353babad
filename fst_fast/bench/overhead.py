"""Measures the cost of a step beside its two passes, and where the time of steps goes."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from fst_fast.data.batches import autocast
from fst_fast.tuning.profiling import STEPS, StepProfile
from fst_fast.tuning.purify import purify

from .ladder import ALPHA, LR, Rung
from .loop_cases import Inputs, LoopCase
from .timing import EventTimer, capture, percentile

# On a CPU: one pair of a pass and a step varies by several percent where others work as well. The
# epoch before them checks every image, and is left out.
PAIRS = 48
# On a GPU: at least so many, of which the first records and is left out; and blocks of replays.
EPOCHS = 3
REPLAYS = 20


class PairedSteps:
    """A loader of one batch over and over; before each, a bare forward and backward pass on it.

    Attributes:
        bare, steps: seconds of the passes, and of what the loop did with the batch, by epoch.
    """

    def __init__(self, loader: Any, inputs: Inputs, how: Mapping[str, Any]) -> None:
        self._length = len(loader)
        self._precision = how["precision"]
        layout = torch.channels_last if how["channels_last"] else torch.contiguous_format
        self._twin = copy.deepcopy(inputs.model).train().to(memory_format=layout)
        self._batch = next(iter(loader))
        self._images = self._batch[0].contiguous(memory_format=layout)
        self.bare: list[list[float]] = []
        self.steps: list[list[float]] = []

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        if not torch.is_grad_enabled():
            # The accuracy is measured here: these are no steps.
            yield from itertools.repeat(self._batch, self._length)
            return
        bare: list[float] = []
        steps: list[float] = []
        for _ in range(self._length):
            started = time.perf_counter()
            self._pass()
            bare.append(time.perf_counter() - started)
            started = time.perf_counter()
            yield self._batch
            steps.append(time.perf_counter() - started)
        # A caller that looked only at the first batch never gets here.
        self.bare.append(bare)
        self.steps.append(steps)

    def _pass(self) -> None:
        with autocast(self._images.device, self._precision):
            logits = self._twin(self._images)
        self._twin.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), self._batch[1]).backward()


def overhead(
    rung: Rung, inputs: Inputs, case: LoopCase, how: Mapping[str, Any]
) -> dict[str, float]:
    """Measure a step beside its forward and backward pass."""
    if inputs.device.type != "cpu":
        return _replayed(inputs, case, how)
    found: list[PairedSteps] = []

    def around(loader: Any) -> PairedSteps:
        found.append(PairedSteps(loader, inputs, how))
        return found[-1]

    epochs = 1 + math.ceil(PAIRS / len(inputs.device_loader(True)))
    rung.run(replace(inputs, around=around), replace(case, epochs=epochs), True, how)
    steps, passes = (
        [1e6 * seconds for epoch in kept[1:] for seconds in epoch]
        for kept in (found[0].steps, found[0].bare)
    )
    apart = [step - bare for step, bare in zip(steps, passes, strict=True)]
    step = percentile(steps, 0.5)
    return {
        "step_us": step,
        "forward_backward_us": percentile(passes, 0.5),
        "share": percentile(apart, 0.5) / step,
        "pairs": len(apart),
    }


def _replayed(inputs: Inputs, case: LoopCase, how: Mapping[str, Any]) -> dict[str, float]:
    """Measure purify's steps behind its first epoch, and a graph of the pass and SGD alone."""
    loader = inputs.device_loader(True)
    bare = {size: _bare_graph(inputs, size, how) for size in dict.fromkeys(loader.batch_sizes())}
    result = purify(
        inputs.model_copy(),
        loader,
        alpha=ALPHA,
        lr=LR,
        epochs=max(EPOCHS, case.epochs),
        device=inputs.device,
        progress=False,
        check=False,
        precision=how["precision"],
        channels_last=how["channels_last"],
        inplace=True,
    )
    first, *_, last = result.history
    step = (last.seconds - first.seconds) / (len(result.history) - 1) / len(loader)
    expected = sum(bare[size] for size in loader.batch_sizes()) / len(loader)
    return {
        "step_us": 1e6 * step,
        "forward_backward_us": 1e6 * expected,
        "share": (step - expected) / step,
    }


def _bare_graph(inputs: Inputs, size: int, how: Mapping[str, Any]) -> float:
    """Seconds of a replay: forward, cross-entropy, backward and fused SGD on one batch."""
    layout = torch.channels_last if how["channels_last"] else torch.contiguous_format
    model = copy.deepcopy(inputs.model).to(inputs.device).train().to(memory_format=layout)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=torch.tensor(LR, device=inputs.device), momentum=0.9, fused=True
    )
    images, labels = next(iter(inputs.device_loader(True)))
    images, labels = images[:size].contiguous(memory_format=layout), labels[:size]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(inputs.device, how["precision"]):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    timer = EventTimer([capture([step]).replay])
    return percentile([timer.block()[0][0] for _ in range(REPLAYS)], 0.5)


def shares(
    rung: Rung, inputs: Inputs, case: LoopCase, how: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Share out the time of a few steps by kind of work; None where an epoch has too few."""
    found: list[StepProfile] = []

    def around(loader: Any) -> StepProfile:
        # Neither the first step nor what follows the last.
        found.append(StepProfile(loader, 1, max(1, min(STEPS, len(loader) - 2))))
        return found[-1]

    rung.run(replace(inputs, around=around), replace(case, epochs=1), True, how)
    profile = found[0]
    profile.stop()
    if not profile.steps:
        return None
    return {"step_us": 1e6 * profile.seconds / profile.steps, "groups": profile.shares()}
