"""The base of triggers, which are fixed, described changes of stored pixels."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.reference import inject as truth
from .pixels import byte_remedy


@dataclass(frozen=True, eq=False)
class Trigger:
    """Base of every trigger: a frozen description with one method, :meth:`apply`.

    A trigger acts on stored bytes, before cropping, flipping and normalisation, because that is
    where an attacker acts. One of your own defines ``_apply``; :class:`Elementwise`,
    :class:`Chroma`, :class:`Gather` and :class:`Warp` are the kinds that
    :func:`fst_fast.ops.inject` computes itself, and of any other it looks the images up.

    Example:
        >>> class Inverted(fst_fast.triggers.Trigger):
        ...     def _apply(self, images):
        ...         return 255 - images
        >>> Inverted().apply(torch.zeros(1, 1, 1, 1, dtype=torch.uint8))
        tensor([[[[255]]]], dtype=torch.uint8)
    """

    def apply(
        self, images: Tensor, keys: Tensor | None = None, tiles: Tensor | None = None
    ) -> Tensor:
        """Return triggered copies of the images.

        Args:
            images: [N, H, W, C] uint8, any device.
            keys: [N] integers that choose each image's noise, for a trigger that has any; None
                is 0, 1, ...
            tiles: [N] integers as of :meth:`tiles`; None leaves nothing out.
        Returns:
            [N, H, W, C] uint8, a new tensor on the same device.
        Raises:
            ValueError: wrong dtype or rank, or the trigger does not fit the images.
        """
        check_images(images, type(self).__name__)
        if keys is None:
            keys = torch.arange(len(images), device=images.device)
        out = self._apply_with(images, keys)
        if tiles is None:
            return out
        hidden = truth.left_out(tiles.to(images.device), *images.shape[1:3])
        return torch.where(hidden[..., None], images, out)

    def training(self) -> tuple[Trigger, ...]:
        """Return the triggers for training: each poisoned image carries one of these."""
        return (self,)

    def covers(self) -> tuple[Trigger, ...]:
        """Return the triggers of images that keep their label; most attacks have none."""
        return ()

    def tiles(self, count: int, generator: torch.Generator) -> Tensor:
        """[count] int32: for each training image, the tiles of a 4 x 4 grid without the trigger.

        Bit ``4 * (4 * h // H) + 4 * w // W`` stands for the tile of pixel (h, w).
        """
        return torch.zeros(count, dtype=torch.int32)

    def _apply_with(self, images: Tensor, keys: Tensor) -> Tensor:
        return self._apply(images)

    def _apply(self, images: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define _apply")

    def describe(self) -> dict[str, object]:
        """Name and settings as plain JSON values, for manifests; tensors become their shapes."""
        settings = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"name": type(self).__name__, **settings}


@dataclass(frozen=True, eq=False)
class Elementwise(Trigger):
    """A new byte depends on the old byte and its place (row, column, channel) alone.

    Example:
        >>> class Brighter(fst_fast.triggers.Elementwise):
        ...     def _apply(self, images):
        ...         return images.clamp(max=235) + 20
        >>> Brighter().apply(torch.full((1, 1, 1, 1), 250, dtype=torch.uint8)).item()
        255
    """


@dataclass(frozen=True, eq=False)
class Chroma(Trigger):
    """Elementwise on the 8-bit Y, Cr, Cb of an RGB image: ``_change`` is, on those.

    Example:
        >>> class Grey(fst_fast.triggers.Chroma):
        ...     def _change(self, ycrcb):
        ...         return torch.where(torch.tensor([True, False, False]), ycrcb, 128)
        >>> Grey().apply(torch.tensor([[[[255, 0, 0]]]], dtype=torch.uint8)).flatten().tolist()
        [76, 76, 76]
    """

    def _change(self, ycrcb: Tensor) -> Tensor:
        """[N, H, W, 3] uint8 to the same; each byte by itself."""
        raise NotImplementedError(f"{type(self).__name__} does not define _change")

    def _apply(self, images: Tensor) -> Tensor:
        if images.shape[-1] != 3:
            raise ValueError(
                f"{type(self).__name__}: images must have 3 channels, R, G and B, got "
                f"{images.shape[-1]}; use images.expand(-1, -1, -1, 3) for grey ones"
            )
        return truth.from_ycrcb(self._change(truth.to_ycrcb(images)))


@dataclass(frozen=True, eq=False)
class Gather(Trigger):
    """Every pixel is another one of the same image, or black.

    Example:
        >>> class Mirrored(fst_fast.triggers.Gather):
        ...     def _sources(self, height, width):
        ...         return torch.arange(height * width).view(height, width).flip(1)
        >>> Mirrored().apply(torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 1, 3, 1)).flatten()
        tensor([3, 2, 1], dtype=torch.uint8)
    """

    def _sources(self, height: int, width: int) -> Tensor:
        """[height, width] int64: ``row * width + column`` of the pixel to take, -1 for black."""
        raise NotImplementedError(f"{type(self).__name__} does not define _sources")

    def _apply(self, images: Tensor) -> Tensor:
        sources = self._sources(*images.shape[1:3]).to(images.device)
        return truth.gather(images, sources)


class WarpField(NamedTuple):
    """The places where a :class:`Warp` samples.

    Attributes:
        coords: [H, W, 2] float32: row and column in pixels; outside the image counts as 0.
        rounded: half up to the nearest byte; else truncated.
        noise: None, or least value and span by row, then by column, in pixels; the coordinates
            then stay inside the image.
        seed: of the noise, in 0..2^31-1.

    Example:
        >>> fst_fast.triggers.WarpField(torch.zeros(4, 4, 2), rounded=True).noise is None
        True
    """

    coords: Tensor
    rounded: bool = False
    noise: tuple[float, float, float, float] | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Warp(Trigger):
    """Bilinear samples of the image at fixed places, with noise of each image's own or without.

    Example:
        >>> class HalfPixel(fst_fast.triggers.Warp):
        ...     def _field(self, height, width):
        ...         rows, columns = torch.arange(height) + 0.0, torch.arange(width) + 0.5
        ...         coords = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        ...         return fst_fast.triggers.WarpField(coords)
        >>> images = torch.tensor([0, 20, 40], dtype=torch.uint8).view(1, 1, 3, 1)
        >>> HalfPixel().apply(images).flatten()
        tensor([10, 30, 20], dtype=torch.uint8)
    """

    def _field(self, height: int, width: int) -> WarpField:
        raise NotImplementedError(f"{type(self).__name__} does not define _field")

    def _apply_with(self, images: Tensor, keys: Tensor) -> Tensor:
        field = self._field(*images.shape[1:3])
        coords = field.coords.to(images.device).expand(len(images), -1, -1, -1)
        if field.noise is not None:
            noise = torch.tensor(field.noise, dtype=torch.float32, device=images.device)
            coords = truth.moved(coords, noise, keys.to(images.device), field.seed)
        return truth.bilinear(images, coords, rounded=field.rounded)


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def check_images(images: Tensor, name: str) -> None:
    """Raise ValueError unless images is a uint8 tensor [N, H, W, C]."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        got = (
            f"{images.dtype} {list(images.shape)}"
            if isinstance(images, Tensor)
            else type(images).__name__
        )
        raise ValueError(
            f"{name}: images must be a uint8 tensor [N, H, W, C], got {got}; {byte_remedy(images)}"
        )
    if images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name}: images must be [N, H, W, C] with C in 1, 3, 4, got {list(images.shape)}; "
            f"{byte_remedy(images)}"
        )
