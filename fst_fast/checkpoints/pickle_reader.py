"""Reads a pickled model file by ``torch.load(weights_only=True)``; for the reading process alone.

Whatever calls this must survive its being killed: a hostile file can exhaust memory or crash torch.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fst_fast.checkpoints.state_dicts import (
    EXPORT,
    WEIGHTS,
    RefusedError,
    few,
    identity,
    layout_fault,
    overlaps,
    unwrap,
)

# A pickled model has no business with the standard library, but for its plain containers.
_ACTIVE = (sys.stdlib_module_names | {"commands", "__builtin__"}) - {
    *("_codecs", "argparse", "collections", "copyreg", "dataclasses", "datetime", "decimal"),
    *("enum", "logging", "pathlib", "random", "threading", "uuid"),
}
_CONVERT = """if you trust its author, convert it in a sandbox without network:
    model = torch.load({path}, weights_only=False)
    torch.save(model.state_dict(), 'weights.pt')  # or the entry that holds the state dict"""
_DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# A zip's last record has so many bytes without a comment.
_END_BYTES = 22


class Ignored:
    """Stands in a loaded file for an object beside the weights; holds and does nothing.

    Results of BackdoorBench hold arrays and scalars of NumPy, checkpoints of timm and torchvision
    the command line's Namespace.
    """

    def __init__(self, *ignored: object) -> None:
        pass

    def __setstate__(self, ignored: object) -> None:
        pass


IGNORED = (
    *("numpy.ndarray", "numpy.dtype", "argparse.Namespace"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
)


def read(path: str) -> tuple[list[str], dict[str, Tensor]]:
    """The keys that lead to the state dict of a pickled file, and the state dict.

    Values are dense and share no memory but as whole, tied tensors; none was looked at.

    Raises:
        RefusedError: anything else.
    """
    keys, state = unwrap(content(path))
    wrong = [f"{name!r}: {found}" for name, v in state.items() if (found := layout_fault(v))]
    if wrong:
        raise RefusedError(WEIGHTS, few(wrong), f"save the weights alone, {EXPORT}")
    shared = overlaps(state)
    if shared:
        got = f"tensors that overlap: {few(shared)}"
        raise RefusedError("tensors apart, or tied whole", got, f"clone them and save, {EXPORT}")
    return keys, state


def content(path: str) -> Any:
    """All that a file holds, as weights_only=True gives it out."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            _check_zip(path)
        stand_ins: list[Any] = [(Ignored, name) for name in IGNORED]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except RefusedError:
        raise
    # A hostile file can raise anything; torch's own text advises weights_only=False: not passed on.
    except Exception as error:
        raise _explain(error) from None


def _check_zip(path: str) -> None:
    """Refuse a compressed archive (a bomb: torch.save never compresses) and damaged bytes.

    And one with anything behind it: to other readers that may be another file.
    """
    with open(path, "rb") as file:
        file.seek(-_END_BYTES, 2)
        if file.read(4) != b"PK\x05\x06":
            got = "a damaged one, or one with bytes behind it"
            raise RefusedError("a zip archive alone", got, "fetch or save it again")
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(r.filename.endswith("/constants.pkl") for r in records):
            got = "a TorchScript program (nothing was run)"
            raise RefusedError(WEIGHTS, got, f"save the weights, {EXPORT}")
        kind = _other_zip([r.filename for r in records])
        if kind is not None:
            raise RefusedError(WEIGHTS, kind, f"load the weights alone, {EXPORT}")
        stored = all(r.compress_type == zipfile.ZIP_STORED for r in records)
        if not stored or sum(r.file_size for r in records) > Path(path).stat().st_size:
            raise RefusedError(
                "uncompressed records, as torch.save writes", "others", f"save it {EXPORT}"
            )
        damaged = archive.testzip()
    if damaged is not None:
        got = f"a wrong CRC-32 in {few([repr(damaged)])}"
        raise RefusedError("undamaged records", got, "fetch or save it again")


def _other_zip(names: list[str]) -> str | None:
    """Say what a zip archive is that torch.save did not write; None where it may have."""
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return None
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)"
    if any(name.endswith((".h5", ".keras")) for name in names):
        return "a Keras model"
    return f"a zip archive of other files ({few(sorted(names)) or 'none'}); unpack it"


def _explain(error: Exception) -> RefusedError:
    text = str(error)
    blocked = re.search(r"GLOBAL ([\w.]{1,200})", text)
    if blocked and is_active(blocked[1]):
        got = f"a pickle that asks for {blocked[1]}, which can run code (nothing was run)"
        return RefusedError(WEIGHTS, got, "do not open it; get a .safetensors file instead")
    if blocked:
        got = f"a pickle of Python objects ({blocked[1]}), as torch.save(model) writes"
        return RefusedError(WEIGHTS, got, _CONVERT)
    reason = text.partition("WeightsUnpickler error:")[2].strip() or text.strip() or "no reason"
    got = f"{type(error).__name__}: {few([reason.splitlines()[0]])}"
    return RefusedError(WEIGHTS, got, "the file is damaged or no model: fetch or save it again")


def is_active(name: str) -> bool:
    """Return whether a global can run code itself; torch writes a builtin without its module."""
    return "." not in name or name.split(".")[0] in _ACTIVE


def write(state: Mapping[str, Tensor], out: BinaryIO) -> None:
    """Write a state dict in the safetensors format, each tied tensor once, streaming.

    Tensors are named by number; metadata["names"] is a JSON list of [name, number] in the order of
    ``state``.
    """
    numbers: dict[tuple[object, ...], int] = {}
    distinct: list[Tensor] = []
    names = []
    for name, value in state.items():
        # Empty tensors have no address.
        key = identity(value) if value.numel() else (name,)
        if key not in numbers:
            numbers[key] = len(distinct)
            distinct.append(value.detach())
        names.append([name, str(numbers[key])])
    header: dict[str, Any] = {"__metadata__": {"names": json.dumps(names)}}
    end = 0
    for number, value in enumerate(distinct):
        start, end = end, end + value.numel() * value.element_size()
        header[str(number)] = {
            "dtype": _DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for value in distinct:
        if value.numel():
            flat = value.resolve_neg().contiguous().flatten()
            out.write(flat.view(torch.uint8).numpy().data)
