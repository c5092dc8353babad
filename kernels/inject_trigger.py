"""What a trigger makes of one byte of each place: the stages of inject, in Triton."""

import triton
import triton.language as tl


@triton.jit
def _fetch(image_ptr, sources_ptr, gathered, h, w, channel, inside, width, pixels, C: tl.constexpr):
    """The byte at (h, w), through the gather table unless ``gathered`` is negative."""
    pixel = h * width + w
    if gathered >= 0:
        pixel = tl.load(sources_ptr + gathered.to(tl.int64) * pixels + pixel, mask=inside, other=-1)
        # A source beyond the image is black as well: nothing outside is read.
        inside = inside & (pixel >= 0) & (pixel < pixels)
    return tl.load(image_ptr + pixel * C + channel, mask=inside, other=0).to(tl.int32)


@triton.jit
def _uniform(seed, key, element):
    """Float32 in [0, 1), multiples of 2^-24."""
    mixed = seed.to(tl.uint32, bitcast=True) + key.to(tl.uint32, bitcast=True) * 0x9E3779B9
    mixed = mixed + element.to(tl.uint32) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    return ((mixed ^ (mixed >> 16)) >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _bilinear(
    image_ptr,
    sources_ptr,
    gathered,
    coords_ptr,
    noise_ptr,
    flags,
    seed,
    key,
    h,
    w,
    channel,
    inside,
    height,
    width,
    C: tl.constexpr,
):
    """((p00 w00 + p01 w01) + p10 w10) + p11 w11; the launch forbids fused multiply-adds."""
    pixels = height * width
    pixel = h * width + w
    row = tl.load(coords_ptr + 2 * pixel, mask=inside, other=0.0)
    column = tl.load(coords_ptr + 2 * pixel + 1, mask=inside, other=0.0)
    if flags & 16:
        shift = tl.load(noise_ptr) + _uniform(seed, key, 2 * pixel) * tl.load(noise_ptr + 1)
        row = tl.minimum(tl.maximum(row + shift, 0.0), tl.cast(height - 1, tl.float32))
        shift = tl.load(noise_ptr + 2) + _uniform(seed, key, 2 * pixel + 1) * tl.load(noise_ptr + 3)
        column = tl.minimum(tl.maximum(column + shift, 0.0), tl.cast(width - 1, tl.float32))
    top = tl.floor(row)
    left = tl.floor(column)
    down = row - top
    right = column - left
    y = top.to(tl.int32)
    x = left.to(tl.int32)
    total = tl.zeros_like(row)
    for tap in tl.static_range(4):
        tap_y = y + tap // 2
        tap_x = x + tap % 2
        there = inside & (tap_y >= 0) & (tap_y < height) & (tap_x >= 0) & (tap_x < width)
        byte = _fetch(
            image_ptr, sources_ptr, gathered, tap_y, tap_x, channel, there, width, pixels, C
        )
        by_row = down if tap // 2 else 1.0 - down
        by_column = right if tap % 2 else 1.0 - right
        total = total + byte.to(tl.float32) * (by_row * by_column)
    if flags & 8:
        total = total + 0.5
    return tl.minimum(total.to(tl.int32), 255)


@triton.jit
def _warped(
    image_ptr,
    sources_ptr,
    gathered,
    coords_ptr,
    noise_ptr,
    flags,
    seed,
    key,
    h,
    w,
    channel,
    inside,
    height,
    width,
    C: tl.constexpr,
):
    """The byte at (h, w) after look-up, gather and bilinear warp."""
    if flags & 4:
        byte = _bilinear(
            image_ptr,
            sources_ptr,
            gathered,
            coords_ptr,
            noise_ptr,
            flags,
            seed,
            key,
            h,
            w,
            channel,
            inside,
            height,
            width,
            C,
        )
    else:
        pixels = height * width
        byte = _fetch(image_ptr, sources_ptr, gathered, h, w, channel, inside, width, pixels, C)
    return byte


@triton.jit
def _clamp(value):
    return tl.minimum(tl.maximum(value, 0), 255)


@triton.jit
def _mapped(byte, patterns_ptr, maps_ptr, flags, offset, inside):
    if flags & 64:
        level = tl.load(patterns_ptr + offset, mask=inside, other=0).to(tl.int32)
        byte = tl.load(maps_ptr + level * 256 + byte, mask=inside, other=0).to(tl.int32)
    return byte


@triton.jit
def _through_ycrcb(red, green, blue, patterns_ptr, maps_ptr, flags, offset, channel, inside):
    """The channel asked for, after the maps of Y, Cr and Cb; ``offset`` is the pixel's first."""
    luma = (4899 * red + 9617 * green + 1868 * blue + 8192) >> 14
    cr = _clamp((((red - luma) * 11682 + 8192) >> 14) + 128)
    cb = _clamp((((blue - luma) * 9241 + 8192) >> 14) + 128)
    luma = _mapped(_clamp(luma), patterns_ptr, maps_ptr, flags, offset, inside)
    cr = _mapped(cr, patterns_ptr, maps_ptr, flags, offset + 1, inside) - 128
    cb = _mapped(cb, patterns_ptr, maps_ptr, flags, offset + 2, inside) - 128
    red = luma + ((cr * 22987 + 8192) >> 14)
    green = luma + ((cr * -11698 + cb * -5636 + 8192) >> 14)
    blue = luma + ((cb * 29049 + 8192) >> 14)
    return _clamp(tl.where(channel == 0, red, tl.where(channel == 1, green, blue)))


@triton.jit
def triggered(
    stored,
    image_ptr,
    row_ptr,
    noise_ptr,
    patterns_ptr,
    maps_ptr,
    sources_ptr,
    coords_ptr,
    lookup_ptr,
    key,
    h,
    w,
    channel,
    inside,
    height,
    width,
    C: tl.constexpr,
):
    """The byte at (h, w) of the triggered image; the stages as in the reference."""
    flags = tl.load(row_ptr)
    seed = tl.load(row_ptr + 5)
    pixels = height * width
    # Not a method: Triton makes a constant of an argument that is 1.
    size = tl.cast(pixels * C, tl.int64)
    patterns_ptr += tl.load(row_ptr + 1) * size
    maps_ptr += tl.load(row_ptr + 2).to(tl.int64) * 256
    coords_ptr += tl.load(row_ptr + 4).to(tl.int64) * pixels * 2
    gathered = tl.load(row_ptr + 3)
    if (flags & 2) == 0:
        gathered = gathered * 0 - 1
    if flags & 1:
        image_ptr = lookup_ptr + key * size
    offset = (h * width + w) * C
    byte = stored
    if flags & 32:
        if C == 3:
            first = channel * 0
            red = _warped(
                image_ptr,
                sources_ptr,
                gathered,
                coords_ptr,
                noise_ptr,
                flags,
                seed,
                key,
                h,
                w,
                first,
                inside,
                height,
                width,
                C,
            )
            green = _warped(
                image_ptr,
                sources_ptr,
                gathered,
                coords_ptr,
                noise_ptr,
                flags,
                seed,
                key,
                h,
                w,
                first + 1,
                inside,
                height,
                width,
                C,
            )
            blue = _warped(
                image_ptr,
                sources_ptr,
                gathered,
                coords_ptr,
                noise_ptr,
                flags,
                seed,
                key,
                h,
                w,
                first + 2,
                inside,
                height,
                width,
                C,
            )
            byte = _through_ycrcb(
                red, green, blue, patterns_ptr, maps_ptr, flags, offset, channel, inside
            )
    else:
        byte = _warped(
            image_ptr,
            sources_ptr,
            gathered,
            coords_ptr,
            noise_ptr,
            flags,
            seed,
            key,
            h,
            w,
            channel,
            inside,
            height,
            width,
            C,
        )
        byte = _mapped(byte, patterns_ptr, maps_ptr, flags, offset + channel, inside)
    return byte
