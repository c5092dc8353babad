"""Hashes, strict JSON, and files replaced all or nothing; standard library only."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Names of files that are not yet, or no longer, what they are to be.
TEMPORARIES = ".fst_fast-*.tmp"


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def strict_json(value: Any, where: str) -> Any:
    """Return value as strict JSON data: NaN and infinity become null, tuples lists, paths text.

    0-d tensors and numpy scalars become numbers; torch dtypes and devices become text.

    Raises:
        ValueError: anything else; ``where`` and the keys below it tell the place.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            raise ValueError(f"save: {where} must have text as keys, got {bad[0]!r}; use str(key)")
        return {str(key): strict_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return strict_json(value.item(), where)
    kind = f"{type(value).__module__}.{type(value).__name__}"
    if isinstance(value, os.PathLike) or kind in ("torch.dtype", "torch.device"):
        return str(value)
    raise ValueError(
        f"save: {where} must be JSON data, got {type(value).__name__}; "
        "convert it to numbers, text, lists or dicts"
    )


def dump_json(value: Any) -> bytes:
    """Return data as JSON text: sorted keys, indented by 2, NaN refused, a newline at the end."""
    return (json.dumps(value, allow_nan=False, sort_keys=True, indent=2) + "\n").encode()


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where it holds something else."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def write_temporary(directory: Path, data: bytes | bytearray) -> Path:
    """Write data under a new hidden name, flush it to the disk, return the name; all or nothing."""
    path = directory / TEMPORARIES.replace("*", secrets.token_hex(8))
    # tempfile's mode 0600 would pass to the final file and hide it from the user's group.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def replace_file(path: Path, data: bytes | bytearray) -> None:
    """Write a file, or leave it as it was and raise; at no moment is it half written."""
    temporary = write_temporary(path.parent, data)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
