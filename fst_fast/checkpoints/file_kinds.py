"""Tells from its first bytes what a file is that is no model file of PyTorch."""

from __future__ import annotations

import re
from pathlib import Path

_READ = 512
# A safetensors header has a length of at most 8 digits, so that these bytes of it are zero.
_HEADER_LIMIT = 10**8
_SAVE = "save its weights with torch.save(model.state_dict(), 'weights.pt') and load those"
_UNPACK = "unpack it and load the file inside"
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"\x89HDF\r\n\x1a\n",
        "an HDF5 file, as Keras writes",
        f"convert it; {_SAVE}",
    ),
    (b"\x93NUMPY", "a NumPy array (.npy)", f"put it into a PyTorch model; {_SAVE}"),
    (b"GGUF", "a GGUF file, which holds quantised weights", "get the PyTorch weights instead"),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"%PDF", "a PDF document", "name the model file"),
    (b"\x89PNG", "a PNG image", "name the model file"),
    (b"\xff\xd8\xff", "a JPEG image", "name the model file"),
)
# Protocol buffers of ONNX: the version of the format, then a field of the model.
_ONNX = re.compile(rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]")
_TEXTS = ("404", "not found", "entry not found", "access to", "invalid username", "unauthorized")


def foreign(path: Path) -> tuple[str, str] | None:
    """Say what the file is and what to do, where it is known to be no model file of PyTorch."""
    with path.open("rb") as file:
        start = file.read(_READ)
    for magic, got, remedy in _STARTS:
        if start.startswith(magic):
            return got, remedy
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite model", "get the PyTorch weights instead"
    if start[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if _ONNX.match(start):
        return (
            "an ONNX model, which is a graph and no state dict",
            f"get the PyTorch model that it was exported from; {_SAVE}",
        )
    return _text(path, start)


def is_safetensors(path: Path) -> bool:
    """Return whether the file begins as the safetensors format does, whatever its name."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") < _HEADER_LIMIT


def _text(path: Path, start: bytes) -> tuple[str, str] | None:
    """Say so of files that are text: pointers, web pages, JSON and a server's excuses."""
    low = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if low.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d{1,15})", low)
        stands = f" for {int(size[1])} bytes" if size else ""
        return (
            f"a Git LFS pointer{stands}: the file itself was not fetched",
            "run git lfs pull in its repository, or download the file from its page",
        )
    if b"annex/objects/" in low or b"annex\\objects\\" in low:
        return "a git-annex pointer: the file itself was not fetched", "run git annex get"
    if low.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        return (
            "a web page (HTML): a download page or an error in place of the file",
            "download the file itself, by its raw or resolve link",
        )
    if low.startswith((b"{", b"[")) and _is_json_start(low):
        return (
            "JSON text, which holds no weights",
            "name the weights beside it, or the folder of an index of shards",
        )
    small = path.stat().st_size < _READ
    if small and any(low.decode("ascii", "replace").startswith(word) for word in _TEXTS):
        shown = start.decode("ascii", "replace").strip().splitlines()[0][:80]
        return f"the text {shown!r}, as a server answers", "fetch it again, and sign in if asked"
    return None


def _is_json_start(low: bytes) -> bool:
    """Return whether what follows the first bracket can be JSON."""
    return low[1:].lstrip()[:1] in (b'"', b"[", b"{", b"}", b"]") or low[1:2].isdigit()
