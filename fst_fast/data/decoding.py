"""Image files, which may be broken or hostile, to RGB: every kind has one fate."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

# Pillow must try no other format: it goes by the content and runs Ghostscript on PostScript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
KINDS = "BMP, GIF, JPEG, PNG, PPM, TIFF or WebP file"
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
# Some decoders read the whole file before they look at it.
LARGEST_BYTES = 2**30
# Resize() by the shorter side multiplies the longer one; a strip of one row would fill the memory.
LARGEST_RATIO = 256


class ImageError(ValueError):
    """An image is refused; says which, what was expected, what came, and what to do."""

    def __init__(self, where: str, expected: str, got: str, remedy: str) -> None:
        where = where if where.isprintable() else ascii(where)
        super().__init__(f"image {where} must be {expected}, got {got}; {remedy}")


def decode(source: Path | bytes, where: str, *, deep: bool = True) -> Image.Image:
    """One image as RGB, to the last bit what ``Image.open(source).convert("RGB")`` gives.

    Palettes are looked up; transparency is dropped, and the colours beneath it stay; CMYK is
    converted without a colour profile; of animations and of files with several pages, the first
    picture is taken; an orientation in the EXIF data is not applied, as torchvision does not. Of 16
    bits per grey pixel the upper 8 are kept, where ``convert`` would clip to white. Nothing is
    decoded before the header's size has been compared with ``PIL.Image.MAX_IMAGE_PIXELS``.

    Args:
        source: a file, or its content.
        where: the name in errors.
        deep: whether 16 bits per grey pixel are taken.
    Raises:
        ImageError: not a regular file, or of more than 1 GiB; none of the known formats, truncated
            or damaged; more pixels than Pillow's limit; one side over 256 times the other; floats,
            32-bit integers, LAB or HSV.
    """
    try:
        if isinstance(source, bytes):
            return _decoded(io.BytesIO(source), where, deep)
        _check_file(source, where)
        with source.open("rb") as file:
            return _decoded(file, where, deep)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(where, str(error)) from None
    # On damaged files Pillow raises a dozen kinds of errors.
    except Exception as error:
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if isinstance(error, UnidentifiedImageError):
            got = "none of these, or a damaged header"
        remedy = "remove or repair the file"
        raise ImageError(where, f"an undamaged {KINDS}", got, remedy) from error


def check_regular(path: Path, where: str) -> int:
    """The size in bytes of a regular file; reading a pipe would wait, and a device never end.

    Raises:
        OSError: the file is not there.
        ValueError: it is something else.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "pipe, socket or device"
        raise ValueError(f"{where} must be a regular file, got a {kind}; remove it")
    return status.st_size


def _check_file(path: Path, where: str) -> None:
    size = check_regular(path, f"image {where}")
    if size == 0:
        remedy = "remove or repair the file"
        raise ImageError(where, f"an undamaged {KINDS}", "an empty file", remedy)
    if size > LARGEST_BYTES:
        remedy = "remove the file, or convert it"
        raise ImageError(where, "a file of at most 1 GiB", f"{size / 2**30:.1f} GiB", remedy)


def _decoded(file: BinaryIO, where: str, deep: bool) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        limit = Image.MAX_IMAGE_PIXELS
        # Pillow itself only warns up to twice its limit.
        if limit is not None and width * height > limit:
            raise _bomb(where, f"{width} x {height}")
        if max(width, height) > LARGEST_RATIO * min(width, height):
            expected = f"at most {LARGEST_RATIO} times as long as it is wide"
            raise ImageError(where, expected, f"{width} x {height}", "remove or crop it")
        if image.mode.startswith("I"):
            return _upper_bits(image, where, deep)
        if image.mode not in EIGHT_BITS:
            expected = "of integers in grey, RGB, CMYK, YCbCr or a palette"
            got = f"the mode {image.mode}"
            raise ImageError(where, expected, got, "convert it to 8 bits per channel")
        # Pillow warns of each palette whose transparency it drops.
        image.info.pop("transparency", None)
        return image.convert("RGB")


def _upper_bits(image: Image.Image, where: str, deep: bool) -> Image.Image:
    if not deep:
        got = f"16 or 32 bits ({image.mode}), which torchvision's loader would clip to white"
        remedy = "convert it to 8 bits"
        raise ImageError(where, "of 8 bits per channel", got, remedy)
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        got = f"32-bit integers from {low} to {high}"
        remedy = "convert it to 8 bits per channel"
        raise ImageError(where, "of 8 or 16 bits per channel", got, remedy)
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _bomb(where: str, got: str) -> ImageError:
    expected = f"of at most {Image.MAX_IMAGE_PIXELS} pixels"
    remedy = "remove it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    return ImageError(where, expected, got, remedy)
