"""From stored bytes to the network's input in one pass: gather, trigger, crop, flip, normalise."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fst_fast.ops import backends
from fst_fast.ops.inject_check import check, check_rows


class TriggerTables(NamedTuple):
    """Triggers for images of one size, as :func:`inject` reads them; see ``triggers.lower``.

    Attributes:
        table: [T, 8] int32, one row per trigger: flags; pattern; first map; gather table;
            coordinates table; noise seed; 0; 0. The flags say which stages run, in this order:
            1 look up the image in ``lookup``, 2 gather by ``sources``, 4 sample bilinearly by
            ``coords`` (8: rounded half up, not truncated; 16: with noise), 32 go to YCrCb for
            64, the byte maps.
        noise: [T, 4] float32 in pixels: least value and span by row, then by column.
        patterns: [P, H, W, C] int16: which byte map holds for a pixel, counted from the first.
        maps: [L, 256] uint8: new value of each byte.
        sources: [G, H, W] int32: ``row * W + column`` of the pixel to take, -1 for 0.
        coords: [Q, H, W, 2] float32: row and column in pixels to sample at.
        lookup: [N, H, W, C] uint8: triggered images.

    Example:
        >>> tables = fst_fast.triggers.lower([fst_fast.triggers.BadNets()], (8, 8, 3))
        >>> tables.table.shape, tables.patterns.shape
        (torch.Size([1, 8]), torch.Size([1, 8, 8, 3]))
    """

    table: Tensor
    noise: Tensor
    patterns: Tensor
    maps: Tensor
    sources: Tensor
    coords: Tensor
    lookup: Tensor


def no_triggers(images: Tensor) -> TriggerTables:
    """Tables without a trigger, for [M, H, W, C] images."""
    return _empty(*images.shape[1:], images.device)


@functools.lru_cache(maxsize=64)
def _empty(height: int, width: int, channels: int, device: torch.device) -> TriggerTables:
    empty = torch.empty(0, dtype=torch.uint8, device=device).new_empty
    return TriggerTables(
        table=empty((0, 8), dtype=torch.int32),
        noise=empty((0, 4), dtype=torch.float32),
        patterns=empty((0, height, width, channels), dtype=torch.int16),
        maps=empty((0, 256)),
        sources=empty((0, height, width), dtype=torch.int32),
        coords=empty((0, height, width, 2), dtype=torch.float32),
        lookup=empty((0, height, width, channels)),
    )


def inject(
    images: Tensor,
    params: Tensor,
    lut: Tensor,
    triggers: TriggerTables | None = None,
    *,
    size: tuple[int, int] | None = None,
    channels_last: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A batch of network inputs from stored images: triggered, cropped, flipped, normalised.

    For sample b, with ``source, row, column, flip, trigger, label, tiles, key = params[b]``::

        image = images[source]                                  # [H, W, C] bytes
        image = where(left out by tiles, image, trigger(image)) # if trigger >= 0
        image = image[row:row + height, column:column + width]  # 0 outside the image
        image = image[:, ::-1] if flip else image
        out[b, c] = lut[c, image[..., c]]

    The order is that of the attacks' own pipelines: triggers act on stored bytes and end in bytes.
    All backends give the same bits.

    Args:
        images: [M, H, W, C] uint8, C in 1, 3, 4, sides up to 1024, contiguous.
        params: [B, 8] int32, contiguous, columns as above. ``row`` and ``column`` may be negative
            (zero padding); ``trigger`` is a row of ``triggers.table`` or -1; ``tiles`` has bit
            ``4 * (4 * h // H) + 4 * w // W`` set where the trigger is left out; ``key`` is the
            row of ``triggers.lookup``, or chooses the noise.
        lut: [C, 256] float32, bfloat16 or float16: the input value of each byte; its dtype is the
            output's. See :func:`fst_fast.triggers.pixels.normalize_table`.
        triggers: None for none.
        size: (height, width) of the output; None for the images' own.
        channels_last: memory layout of the output; False for contiguous.
        backend: one of reference, cpu, triton, cuda; None takes the best available.
    Returns:
        [B, C, height, width] in lut's dtype, and the labels [B] int64.
    Raises:
        ValueError: a shape, dtype, device or layout differs from the above. On the CPU also a
            source, trigger or key that is not there; on a GPU such a sample is all NaN, as
            looking would wait for the device.
        RuntimeError: ``backend`` cannot run here.

    Example:
        >>> images = torch.full((1, 4, 4, 3), 51, dtype=torch.uint8)
        >>> params = torch.tensor([[0, 0, 0, 0, -1, 7, 0, 0]], dtype=torch.int32)
        >>> lut = (torch.arange(256) / 255).expand(3, 256).contiguous()
        >>> out, labels = fst_fast.ops.inject(images, params, lut)
        >>> out.shape, out[0, 0, 0, 0], labels
        (torch.Size([1, 3, 4, 4]), tensor(0.2000), tensor([7]))
    """
    height, width = images.shape[1:3] if size is None else size
    check(images, params, lut, triggers, height, width)
    tables = no_triggers(images) if triggers is None else triggers
    arguments = (images, params, lut, *tables, height, width, channels_last)
    if torch.compiler.is_compiling():
        return torch.ops.fst_fast.inject.default(*arguments, backend or "")
    return _inject(*arguments, backend or "")


torch.library.define(
    "fst_fast::inject",
    "(Tensor images, Tensor params, Tensor lut, Tensor table, Tensor noise, Tensor patterns, "
    "Tensor maps, Tensor sources, Tensor coords, Tensor lookup, SymInt height, SymInt width, "
    "bool channels_last, str backend) -> (Tensor, Tensor)",
)


def _inject(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    function = backends.choose("inject", images.device, backend or None)
    tables = (table, noise, patterns, maps, sources, coords, lookup)
    # The C++ kernel looks for itself.
    if images.device.type == "cpu" and not isinstance(function, torch._ops.OpOverload):
        check_rows(params, images, table, lookup)
    return function(images, params, lut, *tables, height, width, channels_last)


torch.library.impl("fst_fast::inject", "default", _inject)


@torch.library.register_fake("fst_fast::inject")
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (len(params), images.shape[-1], height, width)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(shape, dtype=lut.dtype, device=images.device, memory_format=layout)
    return out, params.new_empty(len(params), dtype=torch.int64)
