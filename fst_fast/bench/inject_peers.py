"""The variants that ``inject`` is compared with: PIL, vectorised torch, torchvision v2, kornia."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fst_fast.ops import inject
from fst_fast.ops.reference import inject as truth

from . import inject_pil, peers
from .inject_cases import MEAN, PAD, STD, InjectCase, InjectInputs

Maker = Callable[[InjectInputs], peers.Call]
# Ratios refer to these.
BASELINES = ("pil", "torch")
WARPS = ("warp", "warp-noise")
_GRAPHED = ("torch", "triton", "cuda")
_ONE_DRAW = "one draw of crop and flip per batch"
_CONTRACTS = "a compiler may fuse multiplication and addition"
_GRID = "grid_sample computes its own coordinates"


@dataclass(frozen=True)
class InjectVariant(peers.Variant):
    """One way to make a batch.

    Attributes:
        check: makes the call that is checked, where the one that is timed draws at random; None
            checks the latter.
        still: it is checked without crop and flip.
        inexact: why it may differ by a byte level, or None where every bit must be the same.
        note: what else differs from ours.
    """

    check: Maker | None = None
    still: bool = False
    inexact: str | None = None
    note: str | None = None


def variants(
    case: InjectCase, device: torch.device, wanted: list[str] | None = None
) -> list[InjectVariant]:
    """Every variant, those that ratios refer to first; those that cannot run say why."""
    warps = case.family in WARPS
    found = [
        _other("pil", inject_pil.make, inject_pil.check, inexact=_GRID if warps else None),
        _other("torch", _torch(), _torch(drawn=True)),
    ]
    if warps:
        makers = (_torch(grid=True), _torch(grid=True, drawn=True))
        found.append(_other("torch_grid_sample", *makers, inexact=_GRID))
    compiled = (_torch(compiled=True), _torch(compiled=True, drawn=True))
    found += [
        _other("compile", *compiled, inexact=_CONTRACTS),
        _other("torchvision_v2", _v2, _v2_still, still=True, inexact=_ONE_DRAW, note=_ONE_DRAW),
        _other("kornia", _kornia, _kornia_still, still=True, inexact="kornia's own arithmetic"),
    ]
    for backend in peers.OURS:
        obstacle = peers._our_obstacle(case.op, device, backend)
        found.append(InjectVariant(backend, _ours(backend), ours=True, obstacle=obstacle))
    found += [peers.in_graph(v, device) for v in found if v.name in _GRAPHED]
    if wanted is None:
        return found
    return [variant for variant in found if variant.name in (*BASELINES, *wanted)]


def known() -> list[str]:
    """The names of all variants."""
    names = [v.name for v in variants(InjectCase("warp", 1, 1, 1, "fp32"), torch.device("cpu"))]
    return list(dict.fromkeys(names))


def _other(name: str, make: Maker, check: Maker, **options: Any) -> InjectVariant:
    packages = {"pil": "torchvision", "torchvision_v2": "torchvision", "kornia": "kornia"}
    package = packages.get(name)
    missing = package is not None and importlib.util.find_spec(package) is None
    obstacle = f"{package} is not installed" if missing else None
    return InjectVariant(name, make, obstacle=obstacle, check=check, **options)


def _ours(backend: str) -> Maker:
    def make(inputs: InjectInputs) -> peers.Call:
        i = inputs
        return lambda: inject(i.stored.images, i.params, i.lut, i.stored.tables, backend=backend)

    return make


# Vectorised torch. A change takes (all images, which of them, ...) to triggered [B, H, W, C] bytes.


def _unchanged(images: Tensor, source: Tensor) -> Tensor:
    return images[source]


def _applied(images: Tensor, source: Tensor, trigger: Any) -> Tensor:
    return trigger.apply(images[source])


def _gathered(images: Tensor, source: Tensor, pixel: Tensor) -> Tensor:
    return truth.gather(images[source], pixel)


def _sampled(images: Tensor, source: Tensor, coords: Tensor) -> Tensor:
    return truth.bilinear(images[source], coords.expand(len(source), -1, -1, -1), rounded=False)


def _shaken(
    images: Tensor, source: Tensor, coords: Tensor, noise: Tensor, *share: Tensor
) -> Tensor:
    at = coords + (noise[0::2] + _share(source, coords, share) * noise[1::2])
    # Filled on the device: a CUDA graph can hold no copy from the host.
    last = torch.stack([coords.new_full((), side - 1.0) for side in coords.shape[:2]])
    return truth.bilinear(images[source], torch.minimum(at.clamp_(min=0), last), rounded=False)


def _grid_sampled(images: Tensor, source: Tensor, grid: Tensor) -> Tensor:
    pixels = images[source].permute(0, 3, 1, 2).float()
    at = grid.expand(len(source), -1, -1, -1)
    out = F.grid_sample(pixels, at, align_corners=True)
    return out.to(torch.uint8).permute(0, 2, 3, 1)


def _grid_shaken(
    images: Tensor, source: Tensor, grid: Tensor, unit: Tensor, *share: Tensor
) -> Tensor:
    at = (grid + _share(source, grid, share) * unit).clamp_(-1, 1)
    return _grid_sampled(images, source, at)


def _share(source: Tensor, like: Tensor, given: tuple[Tensor, ...]) -> Tensor:
    """[B, H, W, 2] in 0..1: given where the result is checked, else drawn."""
    return given[0] if given else torch.rand(len(source), *like.shape, device=like.device)


def _change(
    inputs: InjectInputs, grid: bool, drawn: bool
) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """The change, and its further arguments."""
    stored, family = inputs.stored, inputs.family
    trigger, tables = stored.trigger, stored.tables
    if trigger is None or tables is None:
        return _unchanged, ()
    if family == "lookup":
        return _looked_up, (tables.lookup,)
    if family == "gather":
        return _gathered, (tables.sources[0],)
    if family not in WARPS:
        return _applied, (trigger,)
    coords = tables.coords[0]
    where = inject_pil.to_grid(coords) if grid else coords
    if family == "warp":
        return (_grid_sampled if grid else _sampled), (where,)
    height, width = coords.shape[:2]
    unit = torch.tensor([1 / width, 1 / height], device=coords.device)
    arguments = [where, unit if grid else tables.noise[0]]
    if drawn:
        element = torch.arange(coords.numel(), device=coords.device).view_as(coords)
        keys = inputs.params[:, truth.KEY].view(-1, 1, 1, 1)
        share = truth.uniform(int(tables.table[0, truth.SEED]), keys, element)
        arguments.append(share.flip(-1) if grid else share)
    return (_grid_shaken if grid else _shaken), tuple(arguments)


def _looked_up(images: Tensor, source: Tensor, lookup: Tensor) -> Tensor:
    return lookup[source]


def _batch(
    images: Tensor,
    params: Tensor,
    mean: Tensor,
    std: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    change: Callable[..., Tensor],
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Trigger, zero-pad, crop and flip by one index, normalise; channels-last."""
    source, row, column, flip, _, labels, _, _ = params.long().unbind(1)
    pixels = change(images, source, *arguments)
    count, height, width, _ = pixels.shape
    device = images.device
    down = row[:, None] + torch.arange(PAD, PAD + height, device=device)
    ahead = torch.arange(width, device=device)
    ahead = torch.where(flip[:, None] > 0, width - 1 - ahead, ahead) + (column[:, None] + PAD)
    padded = F.pad(pixels, (0, 0, PAD, PAD, PAD, PAD))
    sample = torch.arange(count, device=device)[:, None, None]
    cropped = padded[sample, down[:, :, None], ahead[:, None, :]]
    # Divided by a tensor: by a number, a GPU multiplies by the inverse.
    out = cropped.float().div_(scale).sub_(mean).div_(std)
    return out.to(dtype).permute(0, 3, 1, 2), labels


_compiled_batch = peers.compiled(_batch)


def _constants(inputs: InjectInputs, *shape: int) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v, device=inputs.params.device) for v in (MEAN, STD))
    return mean.view(shape or (-1,)), std.view(shape or (-1,))


def _torch(*, compiled: bool = False, grid: bool = False, drawn: bool = False) -> Maker:
    function = _compiled_batch if compiled else _batch

    def make(inputs: InjectInputs) -> peers.Call:
        change, arguments = _change(inputs, grid, drawn)
        scale = torch.tensor(255.0, device=inputs.params.device)
        first = (inputs.stored.images, inputs.params, *_constants(inputs), scale, inputs.lut.dtype)
        return lambda: function(*first, change, *arguments)

    return make


def _v2(inputs: InjectInputs, still: bool = False) -> peers.Call:
    """torchvision.transforms.v2 on the batch as one tensor."""
    from torchvision.transforms import v2

    size = tuple(inputs.stored.images.shape[1:3])
    augment = [] if still else [v2.RandomCrop(size, padding=PAD), v2.RandomHorizontalFlip()]
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return _transformed(inputs, v2.Compose([*augment, *finish]), still)


def _kornia(inputs: InjectInputs, still: bool = False) -> peers.Call:
    """kornia.augmentation, which draws for each sample."""
    import kornia.augmentation as K

    size = tuple(inputs.stored.images.shape[1:3])
    crop = K.RandomCrop(size, padding=PAD, p=1.0)
    augment = [] if still else [crop, K.RandomHorizontalFlip(p=0.5)]
    mean, std = (torch.tensor(v, device=inputs.params.device) for v in (MEAN, STD))
    pipeline = torch.nn.Sequential(*augment, K.Normalize(mean, std))
    return _transformed(inputs, lambda pixels: pipeline(pixels.float().div_(255)), still)


_v2_still = functools.partial(_v2, still=True)
_kornia_still = functools.partial(_kornia, still=True)


def _transformed(
    inputs: InjectInputs, transform: Callable[[Tensor], Tensor], still: bool
) -> peers.Call:
    change, arguments = _change(inputs, grid=False, drawn=still)
    images, params = inputs.stored.images, inputs.params

    def call() -> tuple[Tensor, Tensor]:
        pixels = change(images, params[:, truth.SOURCE].long(), *arguments)
        out = transform(pixels.permute(0, 3, 1, 2))
        out = out.to(inputs.lut.dtype, memory_format=torch.channels_last)
        return out, params[:, truth.LABEL].long()

    return call
