"""Folders of weights as the Hugging Face Hub has them: one file, or an index and its shards."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from fst_fast.checkpoints.atomic_files import sha256
from fst_fast.checkpoints.state_dicts import RefusedError, few

# In the order in which transformers looks for them.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX_END = ".index.json"
# The index of a model of a million tensors is smaller.
_INDEX_BYTES = 256_000_000
_MOST_SHARDS = 10_000


def files_of(path: Path) -> list[Path]:
    """The files that hold the weights of ``path``: itself, or those of a folder or an index.

    An index may name files of its own folder only.

    Raises:
        RefusedError: a folder without weights, or an index that is damaged or names others' files.
    """
    named = _in_folder(path) if path.is_dir() else path
    if not named.name.endswith(_INDEX_END) or not named.is_file():
        return [named]
    return [named.parent / name for name in dict.fromkeys(_index(named).values())]


def check_whole(path: Path, found: dict[str, Path]) -> None:
    """Compare the tensors that were found, and where, with the index that ordered them.

    Raises:
        RefusedError: a tensor is missing, in another shard, or in no index.
    """
    named = _in_folder(path) if path.is_dir() else path
    if not named.name.endswith(_INDEX_END):
        return
    told = _index(named)
    wrong = [name for name in told if name not in found or found[name].name != told[name]]
    wrong += [name for name in found if name not in told]
    if wrong:
        raise RefusedError(
            f"the tensors that {named.name} lists, each in its shard",
            f"others: {few(sorted(wrong))}",
            "fetch all shards again, from one revision",
        )


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file; of several files that of their names and digests, line by line."""
    path = Path(path)
    files = files_of(path)
    if files == [path]:
        return sha256(path)
    lines = "".join(f"{sha256(part)}  {part.name}\n" for part in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _in_folder(folder: Path) -> Path:
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    alone = sorted(folder.glob("*.safetensors"))
    if len(alone) == 1:
        return alone[0]
    got = f"a directory with {len(alone)} of them" if alone else "a directory without any"
    raise RefusedError(f"one of {', '.join(_NAMES)}", got, "name the file inside it")


def _index(path: Path) -> dict[str, str]:
    """Names of tensors to names of files in the same folder."""
    expected = "an index of shards: weight_map, from tensors to files beside it"
    again = "fetch it again"
    try:
        size = path.stat().st_size
        content = json.loads(path.read_bytes()) if size <= _INDEX_BYTES else f"{size} bytes"
    except (OSError, ValueError, RecursionError) as error:
        raise RefusedError(expected, f"{type(error).__name__}", again) from None
    mapped = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapped, dict) or not mapped:
        raise RefusedError(expected, "JSON without one", again)
    files = {str(name) for name in mapped.values()}
    # Never a path: an index is not trusted to send its reader anywhere else.
    outside = [name for name in files if name in ("", ".", "..") or Path(name).name != name]
    if outside or any("\\" in name or "\0" in name for name in files) or len(files) > _MOST_SHARDS:
        got = f"others: {few(sorted(outside) or sorted(files))}"
        raise RefusedError(f"names of files beside {path.name}", got, again)
    return {str(name): str(file) for name, file in mapped.items()}
