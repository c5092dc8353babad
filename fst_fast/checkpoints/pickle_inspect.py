"""Lists what a pickled model file asks for and holds; for the reading process alone.

The globals are found by going through the opcodes, which runs nothing.
"""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from torch import _weights_only_unpickler

from fst_fast.checkpoints import pickle_reader
from fst_fast.checkpoints.state_dicts import RefusedError, unwrap

# torch.save's old format is five pickles, then the storages.
_LEGACY_PICKLES = 5
_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "SHORT_BINSTRING"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GET = {"GET", "BINGET", "LONG_BINGET"}


def write(path: str, out: BinaryIO) -> None:
    """Write {"globals": {name: verdict}, "unread": why, "keys", "beside", "tensors", "refused"}."""
    names, unread = _globals(path)
    facts: dict[str, Any] = {"globals": {name: verdict(name) for name in names}, "unread": unread}
    try:
        facts |= _held(pickle_reader.content(path))
        pickle_reader.read(path)
        facts["refused"] = None
    except RefusedError as error:
        facts["refused"] = error.reason
    out.write(json.dumps(facts).encode())


def verdict(name: str) -> str:
    """Judge a global as the reader does: "allowed", "ignored", "an object" or "can run code"."""
    if name in pickle_reader.IGNORED:
        return "ignored"
    if name in _weights_only_unpickler._get_allowed_globals():
        return "allowed"
    return (
        "can run code" if pickle_reader.is_active(name.removeprefix("builtins.")) else "an object"
    )


def _held(content: Any) -> dict[str, Any]:
    keys, state = unwrap(content)
    tensors = [
        [name, str(value.dtype).removeprefix("torch."), list(value.shape)]
        for name, value in state.items()
        if hasattr(value, "dtype")
    ]
    beside: dict[str, str] = {}
    for key in keys:
        beside |= {str(k): type(v).__name__ for k, v in content.items() if k != key}
        content = content[key]
    return {"keys": keys, "beside": beside, "tensors": tensors}


def _globals(path: str) -> tuple[list[str], str | None]:
    """The globals that the pickles in a file name, and why not all of them may be known."""
    found: dict[str, None] = {}
    try:
        for stream in _streams(path):
            for name in _named(stream):
                found[name] = None
    # pickletools raises what it likes on damaged bytes.
    except Exception as error:
        return list(found), f"{type(error).__name__}: {str(error)[:200]}"
    return list(found), None


def _streams(path: str) -> Iterator[BinaryIO]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.filename.endswith(".pkl") and record.compress_type == zipfile.ZIP_STORED:
                    yield io.BytesIO(archive.read(record))
        return
    with open(path, "rb") as file:
        for number in range(_LEGACY_PICKLES):
            at = file.tell()
            # The data after the first pickle need not be one.
            if number and file.read(1) != b"\x80":
                return
            file.seek(at)
            yield file


def _named(stream: BinaryIO) -> Iterator[str]:
    """Every global that a pickle names; "?" where it computes a name that is not plain text."""
    memo: dict[object, str | None] = {}
    # The text that each of the last two values is, None for any other.
    last: list[str | None] = [None, None]
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        if opcode.name == "STACK_GLOBAL":
            yield "?" if None in last else ".".join(map(str, last))
        if opcode.name.startswith("EXT"):
            yield f"copyreg extension {argument}"
        if opcode.name in _PUT:
            memo[len(memo) if argument is None else argument] = last[1]
            continue
        value = None
        if opcode.name in _TEXT:
            value = argument if isinstance(argument, str) else None
        elif opcode.name in _GET:
            value = memo.get(argument)
        last = [last[1], value]
