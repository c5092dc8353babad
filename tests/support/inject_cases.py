"""Random inputs of inject: every stage of a trigger alone and together, in one batch."""

import importlib.util
import os

import torch

from fst_fast.ops import TriggerTables
from fst_fast.triggers.pixels import normalize_table

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
# Every combination of stages that can occur, and one of all of them.
STAGES = {
    "map": 64,
    "ycrcb": 32 | 64,
    "gather": 2,
    "bilinear": 4,
    "bilinear-rounded": 4 | 8,
    "noise": 4 | 16,
    "lookup": 1,
    "lookup-map": 1 | 64,
    "gather-map": 2 | 64,
    "everything": 1 | 2 | 4 | 8 | 16 | 32 | 64,
}
# images, height, width, channels, batch, out height, out width
SHAPES = {
    "cifar": (40, 32, 32, 3, 17, 32, 32),
    "imagenet": (3, 224, 224, 3, 4, 224, 224),
    "odd": (5, 17, 13, 3, 9, 17, 13),
    "grey": (6, 28, 28, 1, 8, 28, 28),
    "four-channels": (4, 9, 21, 4, 6, 9, 21),
    "crop-smaller": (4, 20, 24, 3, 5, 15, 11),
    "crop-larger": (4, 10, 8, 3, 5, 13, 19),
    "one-pixel": (2, 1, 1, 3, 3, 1, 1),
    "wide": (2, 3, 1024, 3, 2, 3, 1024),
    "empty-batch": (4, 8, 8, 3, 0, 8, 8),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def large_blocks(monkeypatch, size):
    """A block of Triton's interpreter costs the same whatever its size."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        monkeypatch.setattr(importlib.import_module("fst_fast.kernels.inject"), "BLOCK", size)


def normalization(channels):
    return tuple(tuple((row * 2)[:channels]) for row in CIFAR)


def tables(height, width, channels, stages, generator, lookups=5):
    """One trigger for each of the stages' flags, with random tables; YCrCb needs 3 channels."""

    def draw(least, end, shape, dtype):
        return torch.randint(least, end, shape, generator=generator).to(dtype)

    flags = [f if channels == 3 else f & ~32 for f in stages]
    count = len(flags)
    table = torch.zeros(count, 8, dtype=torch.int32)
    table[:, 0] = torch.tensor(flags, dtype=torch.int32)
    table[:, 1] = draw(0, 2, (count,), torch.int32)  # pattern
    table[:, 2] = draw(0, 20, (count,), torch.int32)  # first map
    table[:, 3] = draw(0, 2, (count,), torch.int32)  # gather table
    table[:, 4] = draw(0, 2, (count,), torch.int32)  # coordinates
    table[:, 5] = draw(0, 2**31, (count,), torch.int32)  # seed
    coords = torch.rand(2, height, width, 2, generator=generator)
    # Some outside the image, and some on whole pixels.
    coords = (coords * 1.2 - 0.1) * torch.tensor([height - 1.0, width - 1.0])
    coords[0, ::3] = coords[0, ::3].round()
    return TriggerTables(
        table=table,
        noise=torch.rand(count, 4, generator=generator) * torch.tensor([-2.0, 4.0, -2.0, 4.0]),
        patterns=draw(0, 300, (2, height, width, channels), torch.int16),
        maps=draw(0, 256, (320, 256), torch.uint8),
        sources=draw(-1, height * width, (2, height, width), torch.int32),
        coords=coords.contiguous(),
        lookup=draw(0, 256, (lookups, height, width, channels), torch.uint8),
    )


def case(shape="cifar", stages=None, dtype=torch.float32, seed=0):
    """Positional arguments of ops.inject, and the size."""
    generator = torch.Generator().manual_seed(seed)
    stages = tuple(STAGES.values()) if stages is None else stages
    images, height, width, channels, batch, out_height, out_width = SHAPES[shape]
    stored = torch.randint(0, 256, (images, height, width, channels), generator=generator)
    chosen = tables(height, width, channels, stages, generator)
    params = torch.zeros(batch, 8, dtype=torch.int32)

    def draw(column, least, end):
        params[:, column] = torch.randint(least, end, (batch,), generator=generator).int()

    draw(0, 0, images)
    draw(1, -5, 6)
    draw(2, -5, 6)
    draw(3, 0, 2)
    draw(4, -1, len(stages))
    if batch > len(stages):
        params[: len(stages), 4] = torch.arange(len(stages), dtype=torch.int32)
    draw(5, 0, 100)
    draw(6, 0, 2**16)
    params[::3, 6] = 0
    draw(7, 0, len(chosen.lookup))
    lut = normalize_table(channels, normalization(channels), dtype)
    return (stored.to(torch.uint8), params, lut, chosen), (out_height, out_width)


def plain(count, height=32, width=32, channels=3, batch=128, pad=4, seed=0, dtype=torch.float32):
    """Crop, flip, normalise: no trigger. Returns (images, params, lut)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, height, width, channels)
    images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    params = torch.zeros(batch, 8, dtype=torch.int32)
    params[:, 0] = torch.randint(0, count, (batch,), generator=generator).int()
    params[:, 1:3] = torch.randint(-pad, pad + 1, (batch, 2), generator=generator).int()
    params[:, 3] = torch.randint(0, 2, (batch,), generator=generator).int()
    params[:, 4] = -1
    params[:, 5] = torch.randint(0, 10, (batch,), generator=generator).int()
    return images, params, normalize_table(channels, normalization(channels), dtype)
