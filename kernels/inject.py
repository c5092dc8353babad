"""From stored bytes to the network's input in one pass, in Triton.

One program computes one block of one sample's outputs, each on its own, so that every store is
whole; what a sample's trigger does not use is skipped by the whole program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inject_trigger import (
    COLUMN,
    COLUMNS,
    FLAGS,
    FLIP,
    KEY,
    LABEL,
    LEVELS,
    LOOKUP,
    ROW,
    SOURCE,
    TILES,
    TRIGGER,
    Place,
    Shape,
    Tables,
    find_trigger,
    triggered,
)

BLOCK = 256


@triton.jit
def inject_kernel(
    images_ptr,
    params_ptr,
    lut_ptr,
    tables,
    out_ptr,
    labels_ptr,
    images,
    triggers,
    lookups,
    height,
    width,
    out_height,
    out_width,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_TRIGGERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0)
    params_ptr += sample * COLUMNS
    source = tl.load(params_ptr + SOURCE)
    trigger = tl.load(params_ptr + TRIGGER)
    key = tl.load(params_ptr + KEY)
    good = (source >= 0) & (source < images) & (trigger >= -1) & (trigger < triggers)
    source = tl.where(good, source, 0)
    trigger = tl.where(good, trigger, -1)
    out_pixels = out_height * out_width
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        pixel = element // C
        channel = element % C
    else:
        channel = element // out_pixels
        pixel = element % out_pixels
    y = pixel // out_width
    x = pixel % out_width
    x = tl.where(tl.load(params_ptr + FLIP) > 0, out_width - 1 - x, x)
    h = y + tl.load(params_ptr + ROW)
    w = x + tl.load(params_ptr + COLUMN)
    exists = element < out_pixels * C
    inside = exists & (h >= 0) & (h < height) & (w >= 0) & (w < width) & (images > 0)

    image_ptr = images_ptr + source.to(tl.int64) * (height * width * C)
    byte = tl.load(image_ptr + (h * width + w) * C + channel, mask=inside, other=0).to(tl.int32)
    if HAS_TRIGGERS:  # noqa: SIM102 (known when compiled, unlike the next)
        if trigger >= 0:
            if tl.load(tables.table + trigger * COLUMNS + FLAGS) & LOOKUP:
                good = good & (key >= 0) & (key < lookups)
            tile = 4 * (4 * h // height) + 4 * w // width
            left_out = (tl.load(params_ptr + TILES) >> tl.where(inside, tile, 0)) & 1
            shown = inside & (left_out == 0) & good
            shape = Shape(height, width, C)
            found = find_trigger(tables, trigger, image_ptr, key, shape)
            changed = triggered(byte, found, Place(h, w, channel, shown), shape)
            byte = tl.where(shown, changed, byte)
    value = tl.load(lut_ptr + channel * LEVELS + byte, mask=exists, other=0.0).to(tl.float32)
    value = tl.where(good, value, float("nan"))
    tl.store(out_ptr + sample.to(tl.int64) * (out_pixels * C) + element, value, mask=exists)
    if tl.program_id(1) == 0:
        tl.store(labels_ptr + sample, tl.load(params_ptr + LABEL).to(tl.int64))


def inject(
    images: Tensor,
    params: Tensor,
    lut: Tensor,
    table: Tensor,
    noise: Tensor,
    patterns: Tensor,
    maps: Tensor,
    sources: Tensor,
    coords: Tensor,
    lookup: Tensor,
    height: int,
    width: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`fst_fast.ops.inject`."""
    batch, channels = len(params), images.shape[3]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (batch, channels, height, width)
    out = torch.empty(shape, dtype=lut.dtype, device=images.device, memory_format=layout)
    labels = params.new_empty(batch, dtype=torch.int64)
    if batch == 0:
        return out, labels
    grid = (batch, triton.cdiv(height * width * channels, BLOCK))
    tables = Tables(table, noise, patterns, maps, sources, coords, lookup)
    with torch.cuda.device_of(images):
        inject_kernel[grid](
            *(images, params, lut, tables, out, labels),
            *(len(images), len(table), len(lookup), *images.shape[1:3], height, width),
            C=channels,
            CHANNELS_LAST=channels_last,
            HAS_TRIGGERS=len(table) > 0,
            BLOCK=BLOCK,
            # The bilinear warp rounds every product and every sum.
            enable_fp_fusion=False,
        )
    return out, labels
