"""The JSON beside a saved checkpoint: made, and compared with what lies on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fst_fast.checkpoints.atomic_files import dump_json, sha256

FORMAT = "fst_fast checkpoint"
FORMAT_VERSION = 2
RESERVED = {"format", "format_version", "payload", "sha256", "size_bytes", "manifest_sha256"}
# Any two of these make a file one of ours, however damaged.
_MARKS = [f'"{word}"'.encode() for word in (FORMAT, "format_version", "payload", "manifest_sha256")]
# Larger ones are not ours; nobody's file of gigabytes is read to find that out.
_MOST_BYTES = 64_000_000


def seal(fields: Mapping[str, Any], name: str, payload: bytes) -> dict[str, Any]:
    """Add to the caller's fields what describes the payload, and a digest of the whole.

    ``manifest_sha256`` is the SHA-256 of dump_json() of all other fields.
    """
    whole = dict(fields) | {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "payload": name,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "size_bytes": len(payload),
    }
    return whole | {"manifest_sha256": _digest(whole)}


def read(path: Path) -> dict[str, Any] | None:
    """Return the fields of one of our manifests; None where the file is missing or another's.

    Raises:
        ValueError: it is ours, and not as it was written; says how.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return None
        text = path.read_bytes()
    except OSError:
        return None
    if sum(mark in text for mark in _MARKS) < 2:
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("a manifest that is not readable") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError("a manifest that is damaged")
    # Version 1 had no digest of its own.
    if "manifest_sha256" in fields or fields.get("format_version") != 1:
        # Also of spaces: the text must be what seal() and dump_json() made of these fields.
        rest = {name: value for name, value in fields.items() if name != "manifest_sha256"}
        if fields.get("manifest_sha256") != _digest(rest) or text != dump_json(fields):
            raise ValueError("a manifest that was changed after it was written")
    return fields


def fault(payload: Path, manifest: Path) -> str | None:
    """Say how a payload and the manifest beside it disagree; None where they agree or it has none.

    Reads the whole payload where there is a manifest of ours.
    """
    try:
        fields = read(manifest)
    except ValueError as error:
        return str(error)
    if fields is None:
        return None
    digest = sha256(payload)
    if fields.get("sha256") != digest:
        return f"SHA-256 {digest}, recorded {str(fields.get('sha256'))[:64]!r}"
    return None


def _digest(fields: Mapping[str, Any]) -> str:
    try:
        return hashlib.sha256(dump_json(fields)).hexdigest()
    # NaN and infinity, which Python reads and dump_json() does not write.
    except ValueError:
        return ""
