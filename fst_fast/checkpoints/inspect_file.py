"""Say what a model file holds, without loading it into this process."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import safetensors

from fst_fast.checkpoints import manifest, shards
from fst_fast.checkpoints.atomic_files import sha256
from fst_fast.checkpoints.file_kinds import foreign, is_safetensors
from fst_fast.checkpoints.read import LoadError, asked_of, check_file, check_header, judged

_FLOATS = ("F16", "BF16", "F32", "F64", "float16", "bfloat16", "float32", "float64")
_ANSWER_BYTES = 16_000_000
_MANIFEST = ("manifest", "manifest_fault", "manifest_note")


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Look at a model file, or at those of a folder or an index of shards.

    Of a safetensors file its header is read, of any other nothing here.

    A pickle is read by the process that read_state_dict() uses, which goes through its opcodes and
    then tries what read_state_dict() would.

    Returns:
        kind ("safetensors", "zip", "pickle", "something else" or, of several files, "N files"),
        size_bytes and sha256; keys that lead to the state
        dict, beside (what lies next to it: names to types), tensors (name, dtype, shape) and
        parameters (elements of floating-point tensors); globals (names to verdicts: "allowed",
        "ignored", "an object", "can run code") and unread (why the list may be incomplete);
        manifest (its fields), manifest_fault, and manifest_note (how whole JSON beside the file
        differs from its header); refused (why load() would refuse the file, None where nothing
        speaks against it; of a safetensors file the values were not looked at).
        None stands for what the kind does not have or could not be found out.
    Raises:
        LoadError: no such file, a directory without weights, a pipe, an empty file.
    """
    path = Path(path)
    with asked_of(path):
        parts = shards.files_of(path)
    if len(parts) > 1:
        return _of_several(path, [_inspect(part) for part in parts])
    return _inspect(parts[0])


def _of_several(path: Path, each: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of shards as those of one file."""
    facts = dict(each[0])
    facts |= {"kind": f"{len(each)} files", "sha256": shards.digest(path)}
    facts["size_bytes"] = sum(one["size_bytes"] for one in each)
    tensors = [one["tensors"] for one in each if one["tensors"] is not None]
    facts["tensors"] = [tensor for some in tensors for tensor in some] if tensors else None
    facts["parameters"] = sum(one["parameters"] or 0 for one in each)
    named = [one["globals"] for one in each if one["globals"] is not None]
    facts["globals"] = {name: says for some in named for name, says in some.items()} or None
    for key in ("unread", "refused"):
        facts[key] = next((one[key] for one in each if one[key] is not None), None)
    return facts


def _inspect(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = dict.fromkeys(
        ("keys", "beside", "tensors", "parameters", "globals", "unread", "refused", *_MANIFEST)
    )
    known = foreign(path) if path.is_file() else None
    if known is None:
        check_file(path)
    with path.open("rb") as file:
        start = file.read(4)
    named = path.suffix.lower() == ".safetensors"
    pickled = start[:1] == b"\x80" or start == b"PK\x03\x04"
    kind = "zip" if start[:2] == b"PK" else "pickle"
    kind = "safetensors" if is_safetensors(path) or (named and not pickled) else kind
    kind = "something else" if known is not None else kind
    facts |= {"kind": kind, "size_bytes": path.stat().st_size, "sha256": sha256(path)}
    if named:
        facts |= dict(zip(_MANIFEST, manifest.check(path), strict=True))
    if known is not None:
        got, remedy = known
        return facts | {"refused": f"load: {path} is {got}; {remedy}"}
    try:
        facts |= _header(path) if kind == "safetensors" else _pickle(path)
    except LoadError as error:
        facts["refused"] = str(error)
    if named and pickled:
        facts["refused"] = f"load: {path} is named .safetensors and is a pickle; do not open it"
    if facts["manifest_fault"]:
        facts["refused"] = f"load: {path} disagrees with its manifest: {facts['manifest_fault']}"
    if facts["tensors"] is not None:
        sizes = [math.prod(t["shape"]) for t in facts["tensors"] if t["dtype"] in _FLOATS]
        facts["parameters"] = sum(sizes)
    return facts


def _header(path: Path) -> dict[str, Any]:
    try:
        check_header(path)
        with safetensors.safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = [
                {"name": name, "dtype": part.get_dtype(), "shape": part.get_shape()}
                for name, part in slices.items()
            ]
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        return {"refused": f"load: {path} is no safetensors file: {str(error)[:200]}"}
    return {"keys": [], "beside": {}, "tensors": tensors}


def _pickle(path: Path) -> dict[str, Any]:
    with judged(path, "facts") as answer:
        with open(answer, "rb") as file:
            text = file.read(_ANSWER_BYTES + 1)
        if len(text) > _ANSWER_BYTES:
            raise ValueError("too long")
        found = json.loads(text)
        facts: dict[str, Any] = {
            "globals": {str(name): str(says) for name, says in found["globals"].items()},
            "unread": None if found["unread"] is None else str(found["unread"]),
        }
        if found["refused"] is not None:
            _, got, remedy = found["refused"]
            facts["refused"] = f"{got}; {remedy.replace('{path}', repr(str(path)))}"
        if "tensors" in found:
            facts["keys"] = [str(key) for key in found["keys"]]
            facts["beside"] = {str(name): str(kind) for name, kind in found["beside"].items()}
            facts["tensors"] = [
                {"name": str(name), "dtype": str(dtype), "shape": [int(n) for n in shape]}
                for name, dtype, shape in found["tensors"]
            ]
    return facts
