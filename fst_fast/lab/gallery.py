"""Every trigger of the zoo on one picture, with what it changes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import triggers
from ..triggers import Chroma, Elementwise, Gather, Stored, Trigger, Warp

SIDE = 64
COLUMNS = 4
# A drawn picture has a side of so many pixels.
SHOWN = 128
GAP, CAPTION = 8, 34
PAPER, INK, FAINT = (252, 252, 250), (30, 30, 30), (120, 120, 120)


@dataclass(frozen=True)
class Example:
    """One trigger of the zoo, ready to be shown.

    Attributes:
        trigger: None for a class of which no example is known here.
        note: what was made up for it, or what it lacks.
    """

    name: str
    trigger: Trigger | None
    note: str = ""


def names(only: Sequence[str] | None) -> list[str]:
    """Return the names in ``triggers.ZOO`` that are asked for; None is all.

    Raises:
        ValueError: an unknown name.
    """
    for name in only or ():
        if name not in triggers.ZOO:
            raise ValueError(
                f"triggers: --only must name some of {sorted(triggers.ZOO)}, got {name!r}"
            )
    return list(only or triggers.ZOO)


def examples(only: Sequence[str] | None, image: Tensor) -> list[Example]:
    """The zoo's triggers, those that need something given with a stand-in of our own.

    Args:
        only: as of :func:`names`.
        image: [H, W, 3] uint8, what they will be shown on.
    """
    return [_example(name, image) for name in names(only)]


def _example(name: str, image: Tensor) -> Example:
    kind = triggers.ZOO[name]
    if name == "siba":
        return Example(name, triggers.SIBA(_sparse(image), pixels=400), "a random pattern")
    if name == "input-aware":
        return Example(name, triggers.InputAware(*_networks()), "untrained networks")
    if name == "ssba":
        return Example(name, triggers.SSBA(_hidden(image)[None]), "a made-up table")
    if name == "poison-ink":
        return Example(name, triggers.PoisonInk(_inked(image)[None]), "a made-up table")
    needed = needs(kind)
    if needed:
        return Example(name, None, f"needs {', '.join(needed)}")
    return Example(name, kind())


def needs(kind: type[Trigger]) -> list[str]:
    """The settings that have no default."""
    return [
        field.name
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    ]


def family(kind: type[Trigger]) -> str:
    """Say how ``inject`` computes such triggers."""
    families: dict[type[Trigger], str] = {
        Chroma: "byte maps of Y, Cr, Cb",
        Elementwise: "byte maps",
        Gather: "gather",
        Warp: "bilinear warp",
        Stored: "look-up of a given table",
    }
    return next((text for base, text in families.items() if issubclass(kind, base)), "look-up")


def _sparse(image: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    height, width, channels = image.shape
    pattern = torch.zeros(height * width, channels, dtype=torch.int16)
    chosen = torch.randperm(height * width, generator=generator)[: max(1, height * width // 10)]
    signs = torch.randint(0, 2, (len(chosen), channels), generator=generator) * 2 - 1
    pattern[chosen[:400]] = (8 * signs[:400]).to(torch.int16)
    return pattern.view(image.shape)


class _Mixer(nn.Module):
    """Some function of the image."""

    def __init__(self, channels: int, sharp: float) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, channels, 9, padding=4)
        self.sharp = sharp

    def forward(self, x: Tensor) -> Tensor:
        out = self.mix(x)
        return ((out - out.mean((2, 3), keepdim=True)) * self.sharp).sigmoid()


def _networks() -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return _Mixer(3, 12.0), _Mixer(1, 60.0)


def _hidden(image: Tensor) -> Tensor:
    """A faint residue all over the image."""
    generator = torch.Generator().manual_seed(2)
    height, width, channels = image.shape
    coarse = torch.randn(1, channels, 9, 9, generator=generator)
    fine = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (image + 6 * fine[0].permute(1, 2, 0)).round().clamp(0, 255).to(torch.uint8)


def _inked(image: Tensor) -> Tensor:
    """Colour along the edges."""
    grey = image.float().mean(-1)
    edges = torch.zeros_like(grey)
    edges[1:] += (grey[1:] - grey[:-1]).abs()
    edges[:, 1:] += (grey[:, 1:] - grey[:, :-1]).abs()
    ink = torch.tensor([80.0, 160.0, 80.0])
    share = 0.15 * (edges > 28)[..., None]
    return (image + share * (ink - image)).round().to(torch.uint8)


def landscape(side: int = SIDE) -> Tensor:
    """[side, side, 3] uint8: hills, a house and the sun, drawn by arithmetic."""
    fine = side * 4
    row, column = np.mgrid[0:fine, 0:fine] / fine
    picture = np.stack([0.45 + 0.4 * row, 0.65 + 0.22 * row, 0.95 - 0.1 * row], -1)

    def paint(where: Any, *colour: float) -> None:
        picture[where] = colour

    paint((row - 0.2) ** 2 + (column - 0.76) ** 2 < 0.011, 1.0, 0.86, 0.35)
    paint(row > 0.55 + 0.1 * np.sin(5 * column + 0.8), 0.44, 0.62, 0.42)
    paint(row > 0.68 + 0.07 * np.sin(7 * column + 2.6), 0.31, 0.5, 0.27)
    house = (abs(column - 0.34) < 0.13) & (row > 0.5) & (row < 0.76)
    paint(house, 0.86, 0.78, 0.66)
    paint((row > 0.36) & (row < 0.5) & (abs(column - 0.34) < (row - 0.36) * 1.25), 0.66, 0.27, 0.21)
    paint(house & (abs(column - 0.3) < 0.035) & (row > 0.62), 0.36, 0.24, 0.17)
    paint(house & (abs(column - 0.41) < 0.03) & (abs(row - 0.61) < 0.035), 0.52, 0.68, 0.8)
    averaged = picture.reshape(side, 4, side, 4, 3).mean((1, 3))
    return torch.from_numpy((averaged * 255).round().astype(np.uint8))


def read_image(path: Path, side: int = SIDE) -> Tensor:
    """[side, side, 3] uint8 from an image file, its middle square.

    Raises:
        ValueError: no readable image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.fit(opened.convert("RGB"), (side, side))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"triggers: --image must be an image file, got {path}: {error}") from None
    return torch.from_numpy(np.array(picture))


def amplified(clean: Tensor, triggered: Tensor) -> tuple[Tensor, int]:
    """Return the difference, brightened by the largest power of 2 that does not clip; the power."""
    difference = (triggered.int() - clean.int()).abs()
    most = int(difference.max())
    factor = 1
    while most and 2 * factor * most <= 255:
        factor *= 2
    return (difference * factor).to(torch.uint8), factor


def place(number: int) -> tuple[int, int, int]:
    """Return a cell's place in pixels: the left edges of its two pictures, and their top."""
    across, down = number % COLUMNS, number // COLUMNS
    left = GAP * 2 + across * (2 * SHOWN + 3 * GAP)
    return left, left + SHOWN + 2, GAP + CAPTION + down * (SHOWN + CAPTION + GAP)


def draw(shown: Sequence[Example], image: Tensor) -> bytes:
    """A PNG of all of them, each triggered and, at its right, the difference amplified."""
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-(len(shown) + 1) // COLUMNS)
    width = GAP * 4 + COLUMNS * (2 * SHOWN + 3 * GAP) - 3 * GAP
    sheet = Image.new("RGB", (width, GAP + rows * (SHOWN + CAPTION + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    large, small = (ImageFont.load_default(size) for size in (14, 11))

    def put(pixels: Tensor, left: int, top: int) -> None:
        picture = Image.fromarray(pixels.numpy())
        sheet.paste(picture.resize((SHOWN, SHOWN), Image.Resampling.NEAREST), (left, top))

    def caption(left: int, top: int, title: str, note: str) -> None:
        pen.text((left, top - CAPTION + 2), title, INK, large)
        pen.text((left, top - CAPTION + 19), note, FAINT, small)

    left, _, top = place(0)
    put(image, left, top)
    caption(left, top, "the image", "then each trigger, and what it changes")
    for number, example in enumerate(shown, 1):
        left, right, top = place(number)
        if example.trigger is None:
            caption(left, top, example.name, example.note)
            continue
        triggered = example.trigger.apply(image[None])[0]
        difference, factor = amplified(image, triggered)
        put(triggered, left, top)
        put(difference, right, top)
        note = f"change x {factor}" + (f"; {example.note}" if example.note else "")
        caption(left, top, example.name, note)
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()
