"""Cases of ``bench inject``: batches of one trigger each, from a dataset of random bytes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fst_fast import triggers
from fst_fast.ops import TriggerTables
from fst_fast.ops.reference import inject as truth
from fst_fast.triggers.pixels import normalize_table

from .cases import DTYPES

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PAD = 4
CHANNELS = 3
CLASSES = 10
SHAPES = [(128, 32, 32), (128, 224, 224)]
# The stored dataset is larger than a processor's caches.
DATASET_BYTES = 80 * 2**20
# Batches that take turns.
SETS = 8

# One trigger for each way in which inject computes one.
FAMILIES: dict[str, triggers.Trigger | None] = {
    "plain": None,
    "badnets": triggers.BadNets(),
    "blended": triggers.Blended(),
    "ycrcb": triggers.FTrojan(),
    "gather": triggers.BattRotation(),
    "lookup": triggers.BppAttackDithered(),
    "warp": triggers.WaNet(),
    "warp-noise": triggers.WaNet(noise=True),
}


@dataclass(frozen=True)
class Stored:
    """A dataset that stays on the device, and its trigger's tables.

    Attributes:
        images: [M, H, W, C] uint8 on the device.
        host: the same on the CPU.
        host_lookup: what the trigger makes of them, on the CPU, where it is looked up.
    """

    images: Tensor
    host: Tensor
    trigger: triggers.Trigger | None
    tables: TriggerTables | None
    host_lookup: Tensor | None


@dataclass
class InjectInputs:
    """The inputs that make one batch."""

    family: str
    stored: Stored
    params: Tensor  # [B, 8] int32
    lut: Tensor  # [C, 256]

    def still(self) -> InjectInputs:
        """The same batch without crop and flip."""
        params = self.params.clone()
        params[:, truth.ROW : truth.FLIP + 1] = 0
        return replace(self, params=params)


@dataclass(frozen=True)
class InjectCase:
    """A batch whose images all carry the family's trigger, cropped, flipped, normalised."""

    family: str
    B: int
    height: int
    width: int
    dtype: str
    op: ClassVar[str] = "inject"
    flops: ClassVar[int] = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.B, self.height, self.width

    def __str__(self) -> str:
        return f"{self.op} {self.family} {self.shape} {self.dtype}"

    @property
    def bytes(self) -> int:
        """Every stored byte read once, every input value written once."""
        return self.B * self.height * self.width * CHANNELS * (1 + DTYPES[self.dtype].itemsize)

    def make_inputs(self, seed: int, device: torch.device) -> InjectInputs:
        """One batch, drawn by its seed from the one dataset."""
        stored = _store(self.family, self.height, self.width, device)
        count = len(stored.images)
        generator = torch.Generator().manual_seed(seed)
        params = torch.zeros(self.B, 8, dtype=torch.int32)

        def draw(column: int, least: int, end: int) -> None:
            params[:, column] = torch.randint(least, end, (self.B,), generator=generator).int()

        draw(truth.SOURCE, 0, count)
        draw(truth.ROW, -PAD, PAD + 1)
        draw(truth.COLUMN, -PAD, PAD + 1)
        draw(truth.FLIP, 0, 2)
        draw(truth.LABEL, 0, CLASSES)
        params[:, truth.TRIGGER] = -1 if stored.tables is None else 0
        params[:, truth.KEY] = params[:, truth.SOURCE]
        lut = normalize_table(CHANNELS, (MEAN, STD), DTYPES[self.dtype])
        return InjectInputs(self.family, stored, params.to(device), lut.to(device))

    def describe(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "family": self.family,
            "shape": list(self.shape),
            "dtype": self.dtype,
        }


@functools.lru_cache(maxsize=1)
def _store(family: str, height: int, width: int, device: torch.device) -> Stored:
    generator = torch.Generator().manual_seed(0)
    shape = (height, width, CHANNELS)
    count = max(2, DATASET_BYTES // (height * width * CHANNELS))
    host = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    trigger = FAMILIES[family]
    if trigger is None:
        return Stored(host.to(device), host, None, None, None)
    lookup = trigger.apply(host) if triggers.looked_up(trigger, shape) else None
    tables = triggers.lower([trigger], shape, device=device, lookup=lookup)
    return Stored(host.to(device), host, trigger, tables, lookup)


def select(
    families: Sequence[str] | None,
    shapes: Sequence[tuple[int, int, int]] | None,
    dtypes: Sequence[str],
    quick: bool,
) -> list[InjectCase]:
    """The suite's cases: (B, height, width) each with every family; the quick ones are small."""
    chosen = shapes or (SHAPES[:1] if quick else SHAPES)
    return [
        InjectCase(family, *shape, dtype)
        for shape in chosen
        for dtype in dtypes
        for family in families or FAMILIES
    ]
