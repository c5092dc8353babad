"""inject in plain PyTorch: what every other backend must equal to the last bit.

Everything is integer arithmetic on bytes, but for the bilinear warp, whose float32 operations are
each rounded on their own, in the order written here.
"""

import torch
from torch import Tensor

# Columns of params.
SOURCE, ROW, COLUMN, FLIP, TRIGGER, LABEL, TILES, KEY = range(8)
# Columns of table.
FLAGS, PATTERN, MAP, GATHERED, COORDS, SEED = range(6)
# Bits of a trigger's flags, in the order in which its stages run.
LOOKUP, GATHER, BILINEAR, ROUND, NOISE, YCRCB, MAPPED = (1 << bit for bit in range(7))
TILE_ROWS = 4


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
    """See :func:`fst_fast.ops.inject`; a sample that names what is not there becomes NaN."""
    rows = params.long()
    good = valid(rows, images, table, lookup)
    rows = torch.where(good[:, None], rows, torch.zeros_like(rows))
    rows[:, TRIGGER] = torch.where(good, rows[:, TRIGGER], -1)
    pixels = images[rows[:, SOURCE]] if len(images) else images.new_zeros(0, *images.shape[1:])
    for number, trigger in enumerate(table.tolist()):
        chosen = torch.nonzero(rows[:, TRIGGER] == number).flatten()
        if len(chosen):
            tables = (noise[number], patterns, maps, sources, coords, lookup)
            shown = _triggered(pixels[chosen], rows[chosen, KEY], trigger, *tables)
            hidden = left_out(rows[chosen, TILES], *pixels.shape[1:3])
            pixels[chosen] = torch.where(hidden[..., None], pixels[chosen], shown)
    pixels = _crop(pixels, rows, height, width)
    channel = torch.arange(images.shape[-1], device=images.device)
    values = lut[channel, pixels.long()].permute(0, 3, 1, 2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(values.shape, dtype=lut.dtype, device=lut.device, memory_format=layout)
    out.copy_(torch.where(good[:, None, None, None], values, float("nan")))
    return out, params[:, LABEL].long()


def valid(params: Tensor, images: Tensor, table: Tensor, lookup: Tensor) -> Tensor:
    """[B] bool: the source, the trigger and the row looked up are there."""
    source, trigger, key = params[:, SOURCE], params[:, TRIGGER], params[:, KEY]
    good = (source >= 0) & (source < len(images)) & (trigger >= -1) & (trigger < len(table))
    if len(table):
        flags = table[trigger.clamp(0, len(table) - 1).long(), FLAGS]
        looks = (trigger >= 0) & (flags & LOOKUP > 0)
        good &= ~looks | ((key >= 0) & (key < len(lookup)))
    return good


def _triggered(
    pixels: Tensor,
    keys: Tensor,
    trigger: list[int],
    noise: Tensor,
    patterns: Tensor,
    maps: Tensor,
    sources: Tensor,
    coords: Tensor,
    lookup: Tensor,
) -> Tensor:
    """The trigger on [N, H, W, C] bytes, whole images."""
    flags = trigger[FLAGS]
    if flags & LOOKUP:
        pixels = lookup[keys]
    if flags & GATHER:
        pixels = gather(pixels, sources[trigger[GATHERED]])
    if flags & BILINEAR:
        where = coords[trigger[COORDS]].expand(len(pixels), -1, -1, -1)
        if flags & NOISE:
            where = moved(where, noise, keys, trigger[SEED])
        pixels = bilinear(pixels, where, rounded=bool(flags & ROUND))
    if flags & YCRCB:
        pixels = to_ycrcb(pixels)
    if flags & MAPPED:
        level = patterns[trigger[PATTERN]].long() + trigger[MAP]
        pixels = maps[level, pixels.long()]
    return from_ycrcb(pixels) if flags & YCRCB else pixels


def left_out(tiles: Tensor, height: int, width: int) -> Tensor:
    """[N] bit masks of 4 x 4 tiles, row by row from the lowest bit, to [N, H, W] bool."""
    device = tiles.device
    row = torch.arange(height, device=device) * TILE_ROWS // height
    column = torch.arange(width, device=device) * TILE_ROWS // width
    bit = row[:, None] * TILE_ROWS + column
    return (tiles[:, None, None] >> bit) & 1 > 0


def _crop(pixels: Tensor, rows: Tensor, height: int, width: int) -> Tensor:
    """[B, height, width, C] bytes from each image's offset, 0 outside it, then mirrored."""
    device = pixels.device
    row = rows[:, ROW, None] + torch.arange(height, device=device)  # [B, height]
    ahead = torch.arange(width, device=device)
    ahead = torch.where(rows[:, FLIP, None] > 0, width - 1 - ahead, ahead)
    column = rows[:, COLUMN, None] + ahead  # [B, width]
    inside = ((row >= 0) & (row < pixels.shape[1]))[:, :, None]
    inside = inside & ((column >= 0) & (column < pixels.shape[2]))[:, None, :]
    row = row.clamp(0, pixels.shape[1] - 1)[:, :, None]
    column = column.clamp(0, pixels.shape[2] - 1)[:, None, :]
    sample = torch.arange(len(pixels), device=device)[:, None, None]
    return pixels[sample, row, column] * inside[..., None]


def gather(pixels: Tensor, source: Tensor) -> Tensor:
    """Each pixel of [N, H, W, C] from another: [H, W] of ``row * W + column``, 0 where it is -1."""
    flat = pixels.flatten(1, 2)[:, source.clamp(min=0).long()]
    return flat * (source >= 0)[..., None]


def moved(coords: Tensor, noise: Tensor, keys: Tensor, seed: int) -> Tensor:
    """[N, H, W, 2] coordinates with each sample's own noise added, kept inside the image.

    Args:
        coords: [N, H, W, 2] float32, row and column in pixels.
        noise: [4] float32: least value and span for the rows, then for the columns, in pixels.
        keys: [N] integers; a sample's noise depends on its key and the seed alone.
    """
    _, height, width, _ = coords.shape
    element = torch.arange(height * width * 2, device=coords.device).view(height, width, 2)
    share = uniform(seed, keys.view(-1, 1, 1, 1), element)
    at = coords + (noise[0::2] + share * noise[1::2])
    last = torch.tensor([height - 1, width - 1], dtype=at.dtype, device=at.device)
    return torch.minimum(at.clamp(min=0), last)


def uniform(seed: int, key: Tensor, element: Tensor) -> Tensor:
    """Float32 in [0, 1), multiples of 2^-24, from a hash of three 32-bit numbers."""
    bits = 0xFFFFFFFF
    mixed = (seed + key.long() * 0x9E3779B9 + element.long() * 0x85EBCA6B) & bits
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & bits
    mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) & bits
    return ((mixed ^ (mixed >> 16)) >> 8).float() * 2.0**-24


def bilinear(pixels: Tensor, coords: Tensor, *, rounded: bool) -> Tensor:
    """[N, H, W, C] bytes at [N, H, W, 2] coordinates; what lies outside counts as 0.

    ``((p00 * w00 + p01 * w01) + p10 * w10) + p11 * w11`` in float32, then truncated, or rounded
    half up.
    """
    count, height, width, _ = pixels.shape
    low = coords.floor()
    part = coords - low
    rest = 1 - part
    low = low.long()
    sample = torch.arange(count, device=pixels.device)[:, None, None]

    def tap(down: int, right: int) -> Tensor:
        row, column = low[..., 0] + down, low[..., 1] + right
        weight = (part if down else rest)[..., 0] * (part if right else rest)[..., 1]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        value = pixels[sample, row.clamp(0, height - 1), column.clamp(0, width - 1)]
        return (value * inside[..., None]).float() * weight[..., None]

    value = ((tap(0, 0) + tap(0, 1)) + tap(1, 0)) + tap(1, 1)
    value = (value + 0.5) if rounded else value
    return value.floor().clamp(0, 255).to(torch.uint8)


def to_ycrcb(pixels: Tensor) -> Tensor:
    """RGB bytes to Y, Cr, Cb bytes: BT.601, full range, in OpenCV's 14-bit fixed point."""
    red, green, blue = pixels.int().unbind(-1)
    luma = (4899 * red + 9617 * green + 1868 * blue + 8192) >> 14
    cr = (((red - luma) * 11682 + 8192) >> 14) + 128
    cb = (((blue - luma) * 9241 + 8192) >> 14) + 128
    return torch.stack([luma, cr, cb], dim=-1).clamp(0, 255).to(torch.uint8)


def from_ycrcb(pixels: Tensor) -> Tensor:
    """The way back, rounded to bytes again."""
    luma, cr, cb = pixels.int().unbind(-1)
    cr, cb = cr - 128, cb - 128
    red = luma + ((cr * 22987 + 8192) >> 14)
    green = luma + ((cr * -11698 + cb * -5636 + 8192) >> 14)
    blue = luma + ((cb * 29049 + 8192) >> 14)
    return torch.stack([red, green, blue], dim=-1).clamp(0, 255).to(torch.uint8)
