"""Takes torchvision pipelines apart: a part on bytes, a random part, a part on values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2

# The type must be exact: a subclass may do anything.
COMPOSITIONS = (v1.Compose, v2.Compose, torch.nn.Sequential)
RESHAPES = (v1.Resize, v2.Resize, v1.CenterCrop, v2.CenterCrop, v1.Grayscale, v2.Grayscale, v2.RGB)
# These turn a PIL image into a tensor of the same bytes.
CONVERSIONS = (v1.PILToTensor, v2.PILToTensor, v2.ToImage)
TO_TENSOR = (v1.ToTensor, v2.ToTensor)
DTYPES = (v1.ConvertImageDtype, v2.ConvertImageDtype, v2.ToDtype)
NORMALIZES = (v1.Normalize, v2.Normalize)
CROPS = (v1.RandomCrop, v2.RandomCrop)
FLIPS = (v1.RandomHorizontalFlip, v2.RandomHorizontalFlip)
KNOWN = (
    "ToTensor, ToImage, PILToTensor, ToDtype, ConvertImageDtype, Normalize, RandomCrop, "
    "RandomHorizontalFlip, Resize, CenterCrop, Grayscale, RGB"
)


class NotLiftableError(Exception):
    """The reason, in one line, why a loader stays on the host."""


@dataclass
class Pipeline:
    """A transform taken apart. Crops and flips act alike on bytes and on values.

    fixed: steps that draw nothing, PIL image to PIL image or to uint8 [C, H, W], in order.
    values: steps from bytes to floats, in order.
    pad, flip: zero pixels on each side before a random crop back to size; a mirror image half
        the time.
    crop: (height, width) of the random crop; None where there is none.
    normalize: (mean, std) of Normalize; None where there is none.
    """

    fixed: list[Callable[[Any], Any]]
    values: list[Callable[[Any], Any]]
    pad: int = 0
    flip: bool = False
    crop: tuple[int, int] | None = None
    normalize: tuple[list[float], list[float]] | None = None

    @property
    def reshapes(self) -> bool:
        """Return whether the stored bytes differ from the dataset's own."""
        return any(type(step) in RESHAPES for step in self.fixed)


def read_pipeline(transform: Any) -> Pipeline:
    """Take a v1 or v2 transform apart.

    Raises:
        NotLiftableError: a step is not recognised, or stands where its result would differ.
    """
    out = Pipeline([], [])
    for step in _steps(transform):
        if type(step) in RESHAPES:
            _reshape(out, step)
        elif type(step) in CONVERSIONS:
            _convert(out, step)
        elif type(step) in TO_TENSOR + DTYPES:
            _scale(out, step)
        elif type(step) in NORMALIZES:
            _normalize(out, step)
        elif type(step) in CROPS:
            _crop(out, step)
        elif type(step) in FLIPS:
            _flip(out, step)
        else:
            raise NotLiftableError(f"{name_of(step)} is not recognised; recognised are {KNOWN}")
    if not out.values:
        raise NotLiftableError(
            "the transform ends without floats; end it with ToTensor(), or ToImage() and "
            "ToDtype(torch.float32, scale=True)"
        )
    return out


def value_table(pipeline: Pipeline, channels: int) -> Tensor:
    """[channels, 256] float32: what the pipeline's own steps make of each byte."""
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(channels, 2)
    image: Any = Image.fromarray(every[..., 0] if channels == 1 else every)
    # The classes are those of real images: torchvision computes floats differently for each.
    conversions = [step for step in pipeline.fixed if type(step) in CONVERSIONS]
    try:
        for step in conversions + pipeline.values:
            image = step(image)
    except (RuntimeError, TypeError, ValueError) as error:
        raise NotLiftableError(
            f"the transform fails on images of {channels} channels: {error}"
        ) from error
    if tuple(image.shape) != (channels, 16, 16) or image.dtype != torch.float32:
        raise NotLiftableError(
            f"the transform makes {image.dtype} {list(image.shape)} of an image of {channels} "
            "channels; expected float32 of the same channels"
        )
    return image.as_subclass(Tensor).reshape(channels, 256).clone()


def to_bytes(image: Any) -> np.ndarray:
    """uint8 [H, W, C] of a PIL image or a uint8 tensor [C, H, W]."""
    if isinstance(image, Image.Image):
        if image.mode not in ("L", "RGB", "RGBA"):
            raise NotLiftableError(
                f"images of PIL mode {image.mode} are not recognised; recognised are L, RGB, RGBA"
            )
        array = np.asarray(image)
        return array[:, :, None] if array.ndim == 2 else array
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
        return image.as_subclass(Tensor).permute(1, 2, 0).numpy()
    raise NotLiftableError(f"the dataset yields {name_of(image)}; expected PIL images")


def name_of(thing: Any) -> str:
    """For a message: a function's own name, or that of a type."""
    return getattr(thing, "__name__", type(thing).__name__)


def _steps(transform: Any) -> Iterator[Any]:
    if transform is None:
        raise NotLiftableError("the dataset has no transform, so it yields no tensors; set one")
    if type(transform) not in COMPOSITIONS:
        yield transform
        return
    inner = getattr(transform, "transforms", transform)
    for step in inner:
        yield from _steps(step)


def _reshape(out: Pipeline, step: Any) -> None:
    if out.values:
        raise NotLiftableError(f"{name_of(step)} works on floats; put it before ToTensor")
    if out.crop is not None or out.flip:
        raise NotLiftableError(f"{name_of(step)} follows a random step; put it first")
    out.fixed.append(step)


def _convert(out: Pipeline, step: Any) -> None:
    if not out.values:
        out.fixed.append(step)
    elif type(step) is not v2.ToImage:  # which only renames a tensor
        raise NotLiftableError(f"{name_of(step)} follows a step that makes floats; leave it out")


def _scale(out: Pipeline, step: Any) -> None:
    if type(step) in DTYPES and step.dtype != torch.float32:
        raise NotLiftableError(f"{name_of(step)} makes {step.dtype}; expected torch.float32")
    if type(step) is v2.ToDtype and not step.scale and not out.values:
        raise NotLiftableError("ToDtype keeps values 0..255; give it scale=True")
    out.values.append(step)


def _normalize(out: Pipeline, step: Any) -> None:
    if not out.values:
        raise NotLiftableError("Normalize comes before ToTensor; put it last")
    if out.normalize is not None:
        raise NotLiftableError("Normalize stands there twice; merge the two")
    mean, std = (torch.as_tensor(v).float().flatten().tolist() for v in (step.mean, step.std))
    out.normalize = (mean, std)
    out.values.append(step)


def _crop(out: Pipeline, step: Any) -> None:
    padding = step.padding
    sides = {0} if padding is None else set(np.atleast_1d(padding).tolist())
    fill = step.fill
    if out.crop is not None:
        raise NotLiftableError("RandomCrop stands there twice; keep one")
    if len(sides) != 1 or min(sides) < 0:
        raise NotLiftableError(f"RandomCrop has padding {padding}; expected the same on all sides")
    pad = int(sides.pop())
    if pad and step.padding_mode != "constant":
        raise NotLiftableError(f"RandomCrop pads by {step.padding_mode!r}; expected 'constant'")
    if pad and (fill is None or isinstance(fill, dict) or np.any(np.asarray(fill) != 0)):
        raise NotLiftableError(f"RandomCrop fills with {fill}; expected 0")
    if pad and out.normalize is not None:
        raise NotLiftableError("RandomCrop pads after Normalize; put Normalize last")
    out.pad, out.crop = pad, (int(step.size[0]), int(step.size[1]))


def _flip(out: Pipeline, step: Any) -> None:
    if step.p not in (0, 0.5):
        raise NotLiftableError(f"RandomHorizontalFlip has p={step.p}; expected 0.5")
    out.flip = out.flip or step.p == 0.5
