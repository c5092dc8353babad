"""Settings of a run: its arithmetic and its length."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ..data.batches import autocast


@dataclass(frozen=True)
class ComputeSettings:
    """Settings of a step's arithmetic; precision, layout and threads change the rounding.

    As they are asked for, ``precision`` may be "auto", ``channels_last`` and ``threads`` None:
    :func:`fst_fast.tuning.autotune.arrange` settles them.

    Attributes:
        device: where the model is tuned.
        precision: "fp32", "bf16", "fp16" or "auto".
        channels_last: the memory layout of weights and images.
        threads: of PyTorch on the CPU; None leaves them alone.
        backend: of the fused ops; None takes the fastest.
        compile: run the model up to its head through ``torch.compile``.
    """

    device: torch.device
    precision: str = "auto"
    channels_last: bool | None = None
    threads: int | None = None
    backend: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and not (isinstance(self.threads, int) and self.threads > 0):
            raise ValueError(
                f"purify: threads must be an integer >= 1 or None, got {self.threads!r}"
            )
        if self.channels_last not in (True, False, None):
            raise ValueError(
                f"purify: channels_last must be True, False or None, got {self.channels_last!r}"
            )

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def lay_out(self, model: nn.Module) -> None:
        """Put the model's weights into the layout."""
        model.to(memory_format=self.layout)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.device, self.precision)

    def arrangement(self) -> dict[str, Any]:
        """The settings that a trial may choose, by name."""
        return {name: getattr(self, name) for name in ("precision", "channels_last", "threads")}

    def arranged(self, settings: dict[str, Any]) -> ComputeSettings:
        """These settings with precision, layout and threads of :meth:`arrangement`."""
        return replace(self, **settings)


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop.

    Attributes:
        epochs: passes over the loader.
        lr: learning rate of the first epoch.
        momentum: of SGD.
        compute: resolved, nothing in it is "auto".
    """

    epochs: int
    lr: float
    momentum: float
    compute: ComputeSettings

    def plain(self) -> dict[str, object]:
        """All settings in one dict of plain values, for manifests."""
        own = asdict(self)
        compute = own.pop("compute")
        return {**own, **compute, "device": str(self.compute.device)}
