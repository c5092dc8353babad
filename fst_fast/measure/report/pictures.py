"""Sample images as PNG data: a page may show them without asking any network for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .measured import Measured, Observed, Samples

# A longer side is scaled down to this many pixels.
SIDE = 160


@dataclass(frozen=True)
class Picture:
    """One picture and what is said of it.

    Attributes:
        source: a ``data:`` address.
        alt: for those who do not see it.
        said: (which model, its answer, whether that is the label), or empty.
    """

    source: str
    alt: str
    said: tuple[tuple[str, str, bool], ...] = ()


@dataclass(frozen=True)
class Sample:
    """One test image: as it is, triggered, and what the trigger changes, amplified."""

    label: str
    pictures: tuple[Picture, ...]


def samples_of(measured: Measured | None, names: Sequence[str]) -> list[Sample]:
    """The samples, ready to be shown; none where nothing was measured."""
    if measured is None or measured.samples is None:
        return []
    samples = measured.samples
    return [_sample(samples, i, names) for i in range(len(samples.clean))]


def _sample(samples: Samples, i: int, names: Sequence[str]) -> Sample:
    label = names[int(samples.after.labels[i])]
    alt = f"a test image of class {label}"
    pictures = [Picture(_data(samples.clean[i]), alt, _said(samples, i, names, False))]
    if samples.triggered is not None:
        triggered = _data(samples.triggered[i])
        pictures.append(Picture(triggered, f"{alt}, triggered", _said(samples, i, names, True)))
        change, factor = _change(samples.clean[i], samples.triggered[i])
        times = "" if factor == 1 else f", times {factor}"
        pictures.append(Picture(_data(change), f"what the trigger changes{times}"))
    return Sample(label, tuple(pictures))


def _said(
    samples: Samples, i: int, names: Sequence[str], triggered: bool
) -> tuple[tuple[str, str, bool], ...]:
    said = []
    for model, observed in (("suspect", samples.before), ("purified", samples.after)):
        answers = _answers(observed, triggered)
        if observed is not None and answers is not None:
            answer = int(answers[i])
            said.append((model, names[answer], answer == int(observed.labels[i])))
    return tuple(said)


def _answers(observed: Observed | None, triggered: bool) -> np.ndarray | None:
    if observed is None:
        return None
    return observed.triggered if triggered else observed.clean


def _change(clean: np.ndarray, triggered: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the difference, brightened by the largest power of 2 that does not clip; the power."""
    change = np.abs(triggered.astype(np.int32) - clean.astype(np.int32))
    factor = 1
    while change.max() and 2 * factor * change.max() <= 255:
        factor *= 2
    return (change * factor).astype(np.uint8), factor


def _data(image: np.ndarray) -> str:
    """A ``data:`` address of [H, W, C] uint8."""
    return "data:image/png;base64," + base64.b64encode(_png(image, SIDE)).decode()


def _png(image: np.ndarray, most: int) -> bytes:
    """The PNG data of [H, W, C] uint8, scaled down where a side is longer than ``most``."""
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[image.shape[-1]]
    picture = Image.fromarray(image[..., 0] if mode == "L" else image, mode)
    picture.thumbnail((most, most))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def strip(clean: np.ndarray, triggered: np.ndarray) -> bytes:
    """Draw pairs of images as rows: as it is, triggered, and what the trigger changes, amplified.

    Args:
        clean, triggered: [n, H, W, C] uint8; C is 1, 3 or 4.
    Returns:
        PNG data; small images are enlarged by a whole number.
    """
    rows = []
    for one, other in zip(clean, triggered, strict=True):
        change = _change(one, other)[0]
        if change.shape[-1] == 4:
            # An opacity of no change would hide the change of the colours.
            change[..., 3] = 255
        tiles = [np.pad(tile, ((1, 1), (1, 1), (0, 0))) for tile in (one, other, change)]
        rows.append(np.concatenate(tiles, axis=1))
    drawn = np.concatenate(rows)
    times = max(1, SIDE // max(clean.shape[1:3]))
    return _png(drawn.repeat(times, axis=0).repeat(times, axis=1), max(drawn.shape) * times)
