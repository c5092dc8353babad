"""Image files and label sets: whole ones of every kind, and ways to break them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIDE = 12


def noise(*shape, dtype=np.uint8, high=256):
    return np.random.default_rng(sum(shape)).integers(0, high, shape).astype(dtype)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def whole():
    """{name: bytes} of files that are as they should be."""
    rgb = Image.fromarray(noise(SIDE, SIDE, 3))
    grey, clear = rgb.convert("L"), Image.fromarray(noise(SIDE, SIDE, 4))
    palette = rgb.quantize(16)
    others = [Image.fromarray(noise(SIDE, SIDE, 3)[::-1]), grey.convert("RGB")]
    several = {"save_all": True, "append_images": others}
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(noise(SIDE, SIDE, dtype=np.uint16, high=65536))
    return {
        "png": encoded(rgb, "PNG"),
        "png grey": encoded(grey, "PNG"),
        "png one bit": encoded(rgb.convert("1"), "PNG"),
        "png transparent": encoded(clear, "PNG"),
        "png palette": encoded(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "png 16 bits": encoded(deep, "PNG"),
        "png animated": encoded(rgb, "PNG", **several),
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "jpeg turned": encoded(rgb, "JPEG", exif=turned),
        "jpeg progressive": encoded(grey, "JPEG", progressive=True),
        "gif": encoded(palette, "GIF"),
        "gif animated": encoded(rgb, "GIF", **several),
        "tiff": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "tiff cmyk": encoded(rgb.convert("CMYK"), "TIFF", compression="tiff_deflate"),
        "tiff one bit": encoded(rgb.convert("1"), "TIFF", compression="group4"),
        "tiff pages": encoded(rgb, "TIFF", **several),
        "tiff 16 bits": encoded(deep, "TIFF"),
        "webp": encoded(rgb, "WEBP", quality=50),
        "webp lossless": encoded(clear, "WEBP", lossless=True),
        "webp animated": encoded(rgb, "WEBP", **several),
        "bmp": encoded(rgb, "BMP"),
        "bmp palette": encoded(palette, "BMP"),
        "ppm": encoded(rgb, "PPM"),
        "pgm": encoded(grey, "PPM"),
    }


def png_of_size(width, height):
    """A PNG whose header claims a size, and which holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def refused():
    """{name: (bytes, what the error says of them)}."""
    rgb = Image.fromarray(noise(SIDE, SIDE, 3))
    files = whole()
    floats = Image.fromarray(noise(SIDE, SIDE).astype(np.float32) / 255)
    wide = Image.fromarray(noise(SIDE, SIDE, dtype=np.int32, high=2**31))
    lab = Image.new("LAB", (SIDE, SIDE), (50, 10, 10))
    strip = encoded(Image.new("1", (300_000, 1)), "PNG")
    undamaged = "must be an undamaged BMP, .* got .*; remove or repair the file"
    bomb = r"must be of at most \d+ pixels, got .*; remove it, or raise PIL.Image.MAX_IMAGE_PIXELS"
    return {
        "empty": (b"", undamaged),
        "text": (b"not a picture", undamaged),
        "web page": (b"<html><body>404</body></html>", undamaged),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", undamaged),
        "icon": (encoded(rgb, "ICO"), undamaged),
        "zeros": (bytes(4096), undamaged),
        "pickle": (b"\x80\x04N.", undamaged),
        "wrong check sum": (_flipped(files["png"], files["png"].index(b"IDAT") + 9), undamaged),
        **{
            f"{kind} cut to {share}/4": (data[: len(data) * share // 4], undamaged)
            for kind, data in files.items()
            if kind in ("png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm")
            for share in (1, 3)
        },
        "bomb, of which Pillow warns": (png_of_size(10_000, 10_000), bomb),
        "bomb, which Pillow refuses": (png_of_size(60_000, 60_000), bomb),
        "bomb, largest": (png_of_size(2**31 - 1, 2**31 - 1), bomb),
        "bomb, ppm": (b"P6 900000 900000 255 ", bomb),
        "strip": (strip, r"must be at most 256 times as long as it is wide, got 300000 x 1"),
        "floats": (encoded(floats, "TIFF"), "must be of integers in grey, .* got the mode F"),
        "lab": (encoded(lab, "TIFF"), "must be of integers in grey, .* got the mode LAB"),
        "32 bits": (encoded(wide, "TIFF"), "8 or 16 bits per channel, got 32-bit integers from"),
    }


def _flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def mutated(draw, files):
    """One of the files, broken at random; ``draw`` is a random.Random."""
    data = bytearray(draw.choice(files))
    for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
        at = draw.randrange(max(1, len(data)))
        length = draw.choice((1, 2, 4, 4, 16, 200))
        kind = draw.randrange(7)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[draw.randrange(max(1, len(data))) :][:length]
        elif kind == 3:
            data[at : at + length] = bytes([draw.choice((0, 0x7F, 0x80, 0xFF))]) * length
        elif kind == 4:
            other = draw.choice(files)
            data[at:] = other[draw.randrange(len(other)) :]
        else:
            data[at : at + 1] = bytes([draw.randrange(256)])
    return bytes(data)


def arrays(files, draw):
    """The arrays of an .npz set, most of them wrong in one way."""
    joined = np.frombuffer(b"".join(files), np.uint8)
    good = {
        "encoded": joined,
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.arange(len(files)) % 3,
        "classes": np.array(["cat", "dog", "eel"]),
    }
    name = draw.choice(list(good))
    value = good[name]
    changes = [
        lambda: value[:-1],
        lambda: value[::-1],
        lambda: value[None],
        lambda: value[:0],
        lambda: np.concatenate([value, value]),
        lambda: value.astype("S8"),
        lambda: np.zeros((), value.dtype),
        lambda: value.astype(object),
        lambda: value if value.dtype.kind == "U" else value.astype(float) + draw.random(),
        lambda: value if value.dtype.kind == "U" else value.astype(np.int64) - 1,
        lambda: value if value.dtype.kind == "U" else value.astype(np.int64) * 10**6,
        lambda: None,
    ]
    good[name] = draw.choice(changes)()
    return {key: array for key, array in good.items() if array is not None}
