"""What a trigger makes of one byte of each place: the stages of inject, in Triton."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Columns of params.
SOURCE, ROW, COLUMN, FLIP, TRIGGER, LABEL, TILES, KEY = (tl.constexpr(i) for i in range(8))
# Columns of table; a row of either has eight.
FLAGS, PATTERN, MAP, GATHERED, COORDS, SEED = (tl.constexpr(i) for i in range(6))
COLUMNS = tl.constexpr(8)
# Bits of a trigger's flags, in the order in which its stages run.
LOOKUP, GATHER, BILINEAR, ROUND, NOISE, YCRCB, MAPPED = (tl.constexpr(1 << i) for i in range(7))
# Values of a byte.
LEVELS = tl.constexpr(256)


class Tables(NamedTuple):
    """The op's tables: tensors where a kernel is launched, pointers in it."""

    table: Any
    noise: Any
    patterns: Any
    maps: Any
    sources: Any
    coords: Any
    lookup: Any


class Trigger(NamedTuple):
    """One sample's trigger: its flags, where its own part of each table begins, and what it draws.

    ``gathered``: its table of sources, or negative. ``key``: of the sample.
    """

    flags: Any
    image: Any
    noise: Any
    patterns: Any
    maps: Any
    sources: Any
    gathered: Any
    coords: Any
    seed: Any
    key: Any


class Place(NamedTuple):
    """Where each byte is in its image; ``inside``: whether there is such a byte."""

    h: Any
    w: Any
    channel: Any
    inside: Any


class Shape(NamedTuple):
    """Of an image."""

    height: Any
    width: Any
    channels: Any


@triton.jit
def find_trigger(tables, number, image_ptr, key, shape):
    """The trigger in row ``number`` of the table."""
    row_ptr = tables.table + number * COLUMNS
    flags = tl.load(row_ptr + FLAGS)
    pixels = shape.height * shape.width
    # Not a method: Triton makes a constant of an argument that is 1.
    size = tl.cast(pixels * shape.channels, tl.int64)
    gathered = tl.load(row_ptr + GATHERED)
    if (flags & GATHER) == 0:
        gathered = gathered * 0 - 1
    if flags & LOOKUP:
        image_ptr = tables.lookup + key * size
    return Trigger(
        flags,
        image_ptr,
        tables.noise + number * 4,
        tables.patterns + tl.load(row_ptr + PATTERN) * size,
        tables.maps + tl.load(row_ptr + MAP).to(tl.int64) * LEVELS,
        tables.sources,
        gathered,
        tables.coords + tl.load(row_ptr + COORDS).to(tl.int64) * pixels * 2,
        tl.load(row_ptr + SEED),
        key,
    )


@triton.jit
def _fetch(trigger, place, shape):
    """The byte at a place, through the gather table if there is one."""
    pixels = shape.height * shape.width
    pixel = place.h * shape.width + place.w
    inside = place.inside
    if trigger.gathered >= 0:
        source_ptr = trigger.sources + trigger.gathered.to(tl.int64) * pixels
        pixel = tl.load(source_ptr + pixel, mask=inside, other=-1)
        # A source beyond the image is black as well: nothing outside is read.
        inside = inside & (pixel >= 0) & (pixel < pixels)
    byte_ptr = trigger.image + pixel * shape.channels + place.channel
    return tl.load(byte_ptr, mask=inside, other=0).to(tl.int32)


@triton.jit
def _uniform(seed, key, element):
    """Float32 in [0, 1), multiples of 2^-24."""
    mixed = seed.to(tl.uint32, bitcast=True) + key.to(tl.uint32, bitcast=True) * 0x9E3779B9
    mixed = mixed + element.to(tl.uint32) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    return ((mixed ^ (mixed >> 16)) >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _noisy(at, trigger, noise_ptr, element, side):
    """A coordinate, moved by what is drawn for it, inside the image."""
    share = _uniform(trigger.seed, trigger.key, element)
    at = at + (tl.load(noise_ptr) + share * tl.load(noise_ptr + 1))
    return tl.minimum(tl.maximum(at, 0.0), tl.cast(side - 1, tl.float32))


@triton.jit
def _bilinear(trigger, place, shape):
    """((p00 w00 + p01 w01) + p10 w10) + p11 w11; the launch forbids fused multiply-adds."""
    inside = place.inside
    pixel = place.h * shape.width + place.w
    row = tl.load(trigger.coords + 2 * pixel, mask=inside, other=0.0)
    column = tl.load(trigger.coords + 2 * pixel + 1, mask=inside, other=0.0)
    if trigger.flags & NOISE:
        row = _noisy(row, trigger, trigger.noise, 2 * pixel, shape.height)
        column = _noisy(column, trigger, trigger.noise + 2, 2 * pixel + 1, shape.width)
    top = tl.floor(row)
    left = tl.floor(column)
    down = row - top
    right = column - left
    y = top.to(tl.int32)
    x = left.to(tl.int32)
    total = tl.zeros_like(row)
    for tap in tl.static_range(4):
        h = y + tap // 2
        w = x + tap % 2
        there = inside & (h >= 0) & (h < shape.height) & (w >= 0) & (w < shape.width)
        byte = _fetch(trigger, Place(h, w, place.channel, there), shape)
        by_row = down if tap // 2 else 1.0 - down
        by_column = right if tap % 2 else 1.0 - right
        total = total + byte.to(tl.float32) * (by_row * by_column)
    if trigger.flags & ROUND:
        total = total + 0.5
    return tl.minimum(total.to(tl.int32), LEVELS - 1)


@triton.jit
def _warped(trigger, place, shape):
    """The byte at a place after look-up, gather and bilinear warp."""
    if trigger.flags & BILINEAR:
        byte = _bilinear(trigger, place, shape)
    else:
        byte = _fetch(trigger, place, shape)
    return byte


@triton.jit
def _clamp(value):
    return tl.minimum(tl.maximum(value, 0), LEVELS - 1)


@triton.jit
def _mapped(byte, trigger, offset, inside):
    if trigger.flags & MAPPED:
        level = tl.load(trigger.patterns + offset, mask=inside, other=0).to(tl.int32)
        byte = tl.load(trigger.maps + level * LEVELS + byte, mask=inside, other=0).to(tl.int32)
    return byte


@triton.jit
def _through_ycrcb(red, green, blue, trigger, place, offset):
    """The channel asked for, after the maps of Y, Cr and Cb; ``offset`` is the pixel's first."""
    luma = (4899 * red + 9617 * green + 1868 * blue + 8192) >> 14
    cr = _clamp((((red - luma) * 11682 + 8192) >> 14) + 128)
    cb = _clamp((((blue - luma) * 9241 + 8192) >> 14) + 128)
    luma = _mapped(_clamp(luma), trigger, offset, place.inside)
    cr = _mapped(cr, trigger, offset + 1, place.inside) - 128
    cb = _mapped(cb, trigger, offset + 2, place.inside) - 128
    red = luma + ((cr * 22987 + 8192) >> 14)
    green = luma + ((cr * -11698 + cb * -5636 + 8192) >> 14)
    blue = luma + ((cb * 29049 + 8192) >> 14)
    channel = place.channel
    return _clamp(tl.where(channel == 0, red, tl.where(channel == 1, green, blue)))


@triton.jit
def triggered(stored, trigger, place, shape):
    """The byte at a place of the triggered image; the stages as in the reference."""
    offset = (place.h * shape.width + place.w) * shape.channels
    byte = stored
    if trigger.flags & YCRCB:
        if shape.channels == 3:
            first = place.channel * 0
            red = _warped(trigger, Place(place.h, place.w, first, place.inside), shape)
            green = _warped(trigger, Place(place.h, place.w, first + 1, place.inside), shape)
            blue = _warped(trigger, Place(place.h, place.w, first + 2, place.inside), shape)
            byte = _through_ycrcb(red, green, blue, trigger, place, offset)
    else:
        byte = _warped(trigger, place, shape)
        byte = _mapped(byte, trigger, offset + place.channel, place.inside)
    return byte
