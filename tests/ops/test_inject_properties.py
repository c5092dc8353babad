"""inject against a transcription pixel by pixel, over drawn sizes, offsets, flips and mixtures."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inject_cases import STAGES, normalization, tables

from fst_fast.ops import backends, inject
from fst_fast.triggers.pixels import normalize_table

BACKENDS = backends.available("inject", torch.device("cpu"))


@st.composite
def batches(draw):
    """Arguments of inject on small images, and the size."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    channels = draw(st.sampled_from([1, 3, 4]))
    stages = draw(st.lists(st.sampled_from(list(STAGES.values())), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    triggers = tables(height, width, channels, stages, generator, lookups=3)
    images = torch.randint(0, 256, (4, height, width, channels), generator=generator)
    offset = st.integers(-12, 12)
    row = st.tuples(
        st.integers(0, 3),
        *(offset, offset),
        st.integers(0, 1),
        st.integers(-1, len(stages) - 1),
        st.integers(0, 99),
        st.integers(0, 2**16 - 1),
        st.integers(0, 2),
    )
    rows = draw(st.lists(row, min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    lut = normalize_table(channels, normalization(channels), dtype)
    size = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    params = torch.tensor(rows, dtype=torch.int32)
    return (images.to(torch.uint8), params, lut, triggers), size


def mixed_bits(seed, key, element):
    """The hash, in Python's own integers."""
    value = (seed + key * 0x9E3779B9 + element * 0x85EBCA6B) % 2**32
    value = (value ^ value >> 16) * 0x7FEB352D % 2**32
    value = (value ^ value >> 15) * 0x846CA68B % 2**32
    return (value ^ value >> 16) >> 8


def sampled(image, row, column, rounded):
    """Bilinear in float32, one operation at a time."""
    one = np.float32(1)
    top, left = math.floor(row), math.floor(column)
    down, right = np.float32(row - np.float32(top)), np.float32(column - np.float32(left))
    total = None
    for step_row, weight_row in ((0, one - down), (1, down)):
        for step_column, weight_column in ((0, one - right), (1, right)):
            y, x = top + step_row, left + step_column
            inside = 0 <= y < image.shape[0] and 0 <= x < image.shape[1]
            pixel = image[y, x].astype(np.float32) if inside else np.zeros(image.shape[2])
            part = pixel.astype(np.float32) * np.float32(weight_row * weight_column)
            total = part if total is None else total + part
    total = total + np.float32(0.5) if rounded else total
    return np.clip(np.floor(total), 0, 255).astype(np.uint8)


def ycrcb(pixel):
    red, green, blue = (int(v) for v in pixel)
    luma = (4899 * red + 9617 * green + 1868 * blue + 8192) >> 14
    cr, cb = (red - luma) * 11682 + 8192 >> 14, (blue - luma) * 9241 + 8192 >> 14
    return [min(max(v, 0), 255) for v in (luma, cr + 128, cb + 128)]


def rgb(pixel):
    luma, cr, cb = int(pixel[0]), int(pixel[1]) - 128, int(pixel[2]) - 128
    values = (
        luma + (cr * 22987 + 8192 >> 14),
        luma + (cr * -11698 + cb * -5636 + 8192 >> 14),
        luma + (cb * 29049 + 8192 >> 14),
    )
    return [min(max(v, 0), 255) for v in values]


def triggered(image, row, h, w, triggers):
    """One pixel of one triggered image."""
    _, _, _, _, trigger, _, tiles, key = row
    height, width, _ = image.shape
    if trigger < 0 or tiles >> (4 * (4 * h // height) + 4 * w // width) & 1:
        return image[h, w]
    flags, pattern, first_map, gathered, coords, seed, _, _ = triggers.table[trigger].tolist()
    source = triggers.lookup[key].numpy() if flags & 1 else image
    if flags & 2:
        at = int(triggers.sources[gathered, h, w])
        moved = np.zeros_like(source)
        # Only this pixel, or all that a later warp may touch.
        for y in range(height):
            for x in range(width):
                at = int(triggers.sources[gathered, y, x])
                moved[y, x] = source[at // width, at % width] if at >= 0 else 0
        source = moved
    pixel = source[h, w]
    if flags & 4:
        where = triggers.coords[coords, h, w].numpy().copy()
        if flags & 16:
            noise = triggers.noise[trigger].numpy()
            for axis, last in ((0, height - 1), (1, width - 1)):
                share = np.float32(mixed_bits(seed, key, (h * width + w) * 2 + axis) * 2.0**-24)
                shift = noise[2 * axis] + np.float32(share * noise[2 * axis + 1])
                where[axis] = min(max(np.float32(where[axis] + shift), 0), last)
        pixel = sampled(source, np.float32(where[0]), np.float32(where[1]), bool(flags & 8))
    pixel = ycrcb(pixel) if flags & 32 else pixel
    if flags & 64:
        levels = triggers.patterns[pattern, h, w].tolist()
        pixel = [
            int(triggers.maps[first_map + level, int(value)])
            for level, value in zip(levels, pixel, strict=True)
        ]
    return rgb(pixel) if flags & 32 else pixel


def transcribed(images, params, lut, triggers, size):
    out = torch.zeros(len(params), images.shape[-1], *size, dtype=lut.dtype)
    _, height, width, channels = images.shape
    for number, row in enumerate(params.tolist()):
        source, down, right, flip = row[:4]
        for y in range(size[0]):
            for x in range(size[1]):
                h, w = y + down, (size[1] - 1 - x if flip else x) + right
                inside = 0 <= h < height and 0 <= w < width
                image = images[source].numpy()
                pixel = triggered(image, row, h, w, triggers) if inside else [0] * channels
                for channel in range(channels):
                    out[number, channel, y, x] = lut[channel, int(pixel[channel])]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=batches())
def test_every_backend_is_the_transcription(backend, case):
    (images, params, lut, triggers), size = case
    out, labels = inject(images, params, lut, triggers, size=size, backend=backend)
    assert torch.equal(out, transcribed(images, params, lut, triggers, size))
    assert torch.equal(labels, params[:, 5].long())
