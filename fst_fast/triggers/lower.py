"""Triggers as the tables that :func:`fst_fast.ops.inject` reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import TriggerTables
from ..ops.reference import inject as truth
from .base import Chroma, Elementwise, Gather, Trigger, Warp

# Pattern entries are int16.
MOST_MAPS = 2**15


def lower(
    triggers: Sequence[Trigger],
    shape: tuple[int, int, int],
    *,
    device: torch.device | str | None = None,
    lookup: Tensor | None = None,
) -> TriggerTables:
    """The tables of several triggers; trigger ``t`` becomes row ``t``.

    Args:
        triggers: the triggers.
        shape: [H, W, C] of the images.
        device: where the tables are to be.
        lookup: [N, H, W, C] uint8, images that were triggered beforehand, for those triggers of
            which :func:`looked_up` is true.
    Raises:
        ValueError: a trigger does not fit images of that shape.

    Example:
        >>> fst_fast.triggers.lower([fst_fast.triggers.BadNets()], (8, 8, 3)).patterns.shape
        torch.Size([1, 8, 8, 3])
    """
    height, width, channels = shape
    tables = _Tables()
    for trigger in triggers:
        tables.add(trigger, shape)
    stored = torch.empty(0, *shape, dtype=torch.uint8) if lookup is None else lookup
    lowered = TriggerTables(
        table=torch.tensor(tables.rows, dtype=torch.int32).view(-1, 8),
        noise=torch.tensor(tables.noise, dtype=torch.float32).view(-1, 4),
        patterns=_stack(tables.patterns, (height, width, channels), torch.int16),
        maps=torch.cat([torch.empty(0, 256, dtype=torch.uint8), *tables.maps]),
        sources=_stack(tables.sources, (height, width), torch.int32),
        coords=_stack(tables.coords, (height, width, 2), torch.float32),
        lookup=stored,
    )
    return TriggerTables(*[table.to(device).contiguous() for table in lowered])


def looked_up(trigger: Trigger, shape: tuple[int, int, int]) -> bool:
    """Return whether images must be triggered beforehand, one by one: no table holds the change.

    Example:
        >>> fst_fast.triggers.looked_up(fst_fast.triggers.BppAttackDithered(), (8, 8, 3))
        True
    """
    return not isinstance(trigger, Gather | Warp) and _byte_maps(trigger, shape) is None


class _Tables:
    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.noise: list[tuple[float, float, float, float]] = []
        self.patterns: list[Tensor] = []
        self.maps: list[Tensor] = []
        self.sources: list[Tensor] = []
        self.coords: list[Tensor] = []

    def add(self, trigger: Trigger, shape: tuple[int, int, int]) -> None:
        row = [0] * 8
        noise = (0.0, 0.0, 0.0, 0.0)
        if isinstance(trigger, Gather):
            row[truth.FLAGS], row[truth.GATHERED] = truth.GATHER, len(self.sources)
            self.sources.append(trigger._sources(*shape[:2]))
        elif isinstance(trigger, Warp):
            field = trigger._field(*shape[:2])
            row[truth.FLAGS] = truth.BILINEAR | (truth.ROUND if field.rounded else 0)
            row[truth.COORDS], row[truth.SEED] = len(self.coords), field.seed
            self.coords.append(field.coords)
            if field.noise is not None:
                row[truth.FLAGS] |= truth.NOISE
                noise = field.noise
        elif (found := _byte_maps(trigger, shape)) is None:
            row[truth.FLAGS] = truth.LOOKUP
        else:
            row[truth.FLAGS] = truth.MAPPED | (truth.YCRCB if isinstance(trigger, Chroma) else 0)
            row[truth.PATTERN] = len(self.patterns)
            row[truth.MAP] = sum(len(maps) for maps in self.maps)
            self.patterns.append(found[0])
            self.maps.append(found[1])
        self.rows.append(row)
        self.noise.append(noise)


def _byte_maps(trigger: Trigger, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor] | None:
    """(pattern [H, W, C] int16, maps [L, 256] uint8) of an elementwise trigger, else None.

    Found by showing it one image of each byte, so that the tables cannot differ from ``apply``.
    None too if places differ in more ways than a pattern can count.
    """
    if not isinstance(trigger, Elementwise | Chroma):
        return None
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    images = levels.expand(256, *shape).contiguous()
    change = trigger._change if isinstance(trigger, Chroma) else trigger._apply
    seen = change(images).flatten(1).t().contiguous()  # [H * W * C, 256]
    # Equal maps have equal sums under random weights; that different ones do not is checked.
    weights = torch.randint(-(2**62), 2**62, (256,), generator=torch.Generator().manual_seed(0))
    digest = torch.cat([(rows.long() * weights).sum(1) for rows in seen.split(1 << 16)])
    _, pattern = digest.unique(return_inverse=True)
    count = int(pattern.max()) + 1
    if count > MOST_MAPS:
        return None
    first = torch.full((count,), len(pattern)).scatter_reduce(
        0, pattern, torch.arange(len(pattern)), "amin"
    )
    maps = seen[first]
    if not all(
        torch.equal(maps[p], rows)
        for p, rows in zip(pattern.split(1 << 16), seen.split(1 << 16), strict=True)
    ):
        return None
    return pattern.view(shape).to(torch.int16), maps


def _stack(tensors: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.stack(tensors).to(dtype) if tensors else torch.empty(0, *shape, dtype=dtype)
