"""A tuning method sees and sets a run through this part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.batches import Batches, check_batch
from ..data.device_loader import DeviceLoader
from ..methods import HeadState
from .averaging import WeightAverage
from .cuda_graphs import Replays
from .distributed_looks import accuracy_of
from .run_state import RunState
from .settings import LoopSettings
from .step import Step


@dataclass(frozen=True)
class Position:
    """The place that a run has reached.

    Attributes:
        epoch: epochs that are done.
        step, images: steps and images of the next epoch that are done.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0

    @property
    def within(self) -> bool:
        """Return whether the run stands within an epoch rather than before it."""
        return self.step > 0


class MethodRun:
    """The :class:`~fst_fast.methods.Run` of a method; the loop that is one sets its attributes."""

    model: nn.Module
    head: HeadState
    settings: LoopSettings
    step: Step
    state: RunState
    position: Position
    epochs: int
    classes: int
    head_lr: float
    head_only_until: int
    average: WeightAverage | None
    memo: dict[str, Any]
    findings: list[Mapping[str, Any]]
    _batches: Batches | None
    _replays: Replays | None
    _validate: Callable[[nn.Module], float] | None

    @property
    def head_only(self) -> bool:
        return self.step.head_only

    @head_only.setter
    def head_only(self, wanted: bool) -> None:
        if wanted != self.step.head_only:
            self.step.head_only = wanted
            for parameter in self.step.backbone:
                parameter.requires_grad_(not wanted)

    def average_weights(self, share: float) -> None:
        self.average = WeightAverage(self.model, share, self.epochs, self.state)

    @property
    def goes_on_within(self) -> bool:
        return self.position.within

    @property
    def batch_size(self) -> int:
        assert self._batches is not None
        return len(self._batches.first[1])

    def register(self, name: str, tensor: torch.Tensor) -> None:
        self.state.add(name, tensor, "other")

    def sample(self, images: int, most_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._batches is not None
        device = self.settings.compute.device
        taken, labels, count = [], [], 0
        loader, batches = self._batches.loader, self._batches.epoch(0)
        if isinstance(loader, DeviceLoader):
            batches = iter(loader.plain(shuffle=True))
        for batch in batches:
            some, named = check_batch(batch, self._batches.where, device, self.classes)
            most = min(images, most_bytes // (some[0].numel() * 4)) - count
            if most <= 0:
                break
            taken.append(self.step.place(some[:most]).contiguous())
            labels.append(named[:most].to(device, torch.int64))
            count += len(labels[-1])
        return torch.cat(taken), torch.cat(labels)

    def pixel_range(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._batches is not None
        normalize = getattr(self._batches.loader, "normalize", None)
        if isinstance(self._batches.loader, DeviceLoader):
            mean, std = ((0.0,), (1.0,)) if normalize is None else normalize
            ends = torch.tensor(
                [[(end - m) / s for m, s in zip(mean, std, strict=True)] for end in (0.0, 1.0)]
            ).to(images.device)
            return ends[0].view(1, -1, 1, 1), ends[1].view(1, -1, 1, 1)
        return images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)

    def logits(self, images: torch.Tensor, model: nn.Module | None = None) -> torch.Tensor:
        model = self.model if model is None else model

        def forward(part: torch.Tensor) -> torch.Tensor:
            with self.settings.compute.autocast():
                output = model(part)
            return self.step.logits(output)

        logits = self.step.on_rows(model, forward, self.step.place(images))
        assert logits is not None
        return logits

    def on_rows(
        self,
        forward: Callable[..., torch.Tensor],
        inputs: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        out = self.step.on_rows(self.model, forward, inputs, *tensors)
        assert out is not None
        return out

    @property
    def loss_scale(self) -> torch.Tensor:
        return self.step.guard.scale

    def clean_accuracy(self) -> float:
        if self._validate is not None:
            return self._validate(self.model)
        assert self._batches is not None
        ranks = None if self.step.shared is None else self.step.shared.ranks
        return accuracy_of(self.model, self._batches, self.settings.compute, ranks)

    def repeat(self, name: str, work: Callable[[], None], times: int) -> None:
        assert self._replays is not None
        for _ in range(times):
            self._replays.run(("method", name), work)
