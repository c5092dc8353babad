"""What a step costs beside its forward and backward pass, and where the time of steps goes."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from fst_fast.inputs import autocast
from fst_fast.profiling import STEPS, StepProfile

from .ladder import Rung
from .loop_cases import Inputs, LoopCase
from .timing import percentile

# The first checks every image, and is left out.
EPOCHS = 3


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
        bare: list[float] = []
        steps: list[float] = []
        for _ in range(self._length):
            started = time.perf_counter()
            self._pass()
            bare.append(time.perf_counter() - started)
            started = time.perf_counter()
            yield self._batch
            steps.append(time.perf_counter() - started)
        # Not reached where only the first batch was looked at.
        self.bare.append(bare)
        self.steps.append(steps)

    def _pass(self) -> None:
        with autocast(self._images.device, self._precision):
            logits = self._twin(self._images)
        self._twin.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), self._batch[1]).backward()


def overhead(
    rung: Rung, inputs: Inputs, case: LoopCase, how: Mapping[str, Any]
) -> dict[str, float] | None:
    """Of a step on the CPU, by medians over steps in turn with bare passes; None on a GPU."""
    if inputs.device.type != "cpu":
        return None
    found: list[PairedSteps] = []

    def around(loader: Any) -> PairedSteps:
        found.append(PairedSteps(loader, inputs, how))
        return found[-1]

    rung.run(replace(inputs, around=around), replace(case, epochs=EPOCHS), True, how)
    step, bare = (
        percentile([seconds for epoch in epochs[1:] for seconds in epoch], 0.5) * 1e6
        for epochs in (found[0].steps, found[0].bare)
    )
    return {"step_us": step, "forward_backward_us": bare, "share": (step - bare) / step}


def shares(
    rung: Rung, inputs: Inputs, case: LoopCase, how: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Of the time of a few steps, by kind of work; None where an epoch has too few."""
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
