"""The facts of a saved checkpoint: in the header of its file, and a copy as JSON beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fst_fast.checkpoints.atomic_files import dump_json, sha256

FORMAT = "fst_fast checkpoint"
FORMAT_VERSION = 3
RESERVED = {"format", "format_version", "payload", "sha256", "size_bytes", "manifest_sha256"}
# Any two of these make a file one of ours, however damaged.
_MARKS = [f'"{word}"'.encode() for word in (FORMAT, "format_version", "payload", "manifest_sha256")]
# Larger ones are not ours; nobody's file of gigabytes is read to find that out.
_MOST_BYTES = 64_000_000
# In a header's metadata: the facts, and the SHA-256 of the file with zeros in the place of that.
_FACTS, _DIGEST = "fst_fast", "fst_fast_sha256"
_BEFORE = {name: f'"{name}":"'.encode() for name in (_FACTS, _DIGEST)}
_ZEROS = b"0" * 64
# A fact with more text than this is in the JSON alone, since a header has a limit.
_MOST_TEXT = 500_000
_MOST_HEADER = 4_000_000


class Checked(NamedTuple):
    """The findings about a payload and the JSON beside it.

    Attributes:
        facts: of the header, or of JSON alone, where a payload without any has that; None where
            there are none of ours.
        fault: what is damaged, or None.
        note: how whole JSON differs from the header, which then holds, or None.
    """

    facts: dict[str, Any] | None
    fault: str | None = None
    note: str | None = None


def seal(fields: Mapping[str, Any], name: str, payload: bytes) -> tuple[bytearray, dict[str, Any]]:
    """Put the caller's fields into a payload's header; returns the payload and the JSON's fields.

    What a clock says is not in the header, so that the same weights make the same file.
    The latter add what describes the payload. ``manifest_sha256`` is the SHA-256 of dump_json() of
    all other fields.
    """
    facts = dict(fields) | {"format": FORMAT, "format_version": FORMAT_VERSION}
    lasting = {key: _lasting(value) for key, value in facts.items() if key != "seconds"}
    short = {key: value for key, value in lasting.items() if len(json.dumps(value)) <= _MOST_TEXT}
    end = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8:end])
    told = {_DIGEST: _ZEROS.decode(), _FACTS: json.dumps(short, allow_nan=False, sort_keys=True)}
    header["__metadata__"] = {**header.get("__metadata__", {}), **told}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    at = 8 + text.index(_BEFORE[_DIGEST]) + len(_BEFORE[_DIGEST])
    whole = bytearray(len(text).to_bytes(8, "little") + text + payload[end:])
    whole[at : at + 64] = hashlib.sha256(whole).hexdigest().encode()
    facts |= {"payload": name, "sha256": hashlib.sha256(whole).hexdigest()}
    facts["size_bytes"] = len(whole)
    return whole, facts | {"manifest_sha256": _digest(facts)}


def header_facts(payload: Path) -> dict[str, Any] | None:
    """The facts in a payload's header, None where it has none of ours; reads the whole file.

    Raises:
        ValueError: the file is ours, and not as it was written; says how.
    """
    with payload.open("rb") as file:
        start = file.read(8)
        header = file.read(min(int.from_bytes(start, "little"), _MOST_HEADER))
        counts = {header.count(mark) for mark in _BEFORE.values()}
        if counts == {0}:
            return None
        if counts != {1}:
            raise ValueError("a header that is damaged")
        at = header.index(_BEFORE[_DIGEST]) + len(_BEFORE[_DIGEST])
        digest = hashlib.sha256(start + header[:at] + _ZEROS + header[at + 64 :])
        while block := file.read(1 << 20):
            digest.update(block)
    recorded = header[at : at + 64].decode(errors="replace")
    if recorded != digest.hexdigest():
        raise ValueError(f"SHA-256 {digest.hexdigest()}, recorded {recorded!r}")
    found: dict[str, Any] = json.loads(json.loads(header)["__metadata__"][_FACTS])
    return found


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


def check(payload: Path) -> Checked:
    """Check that a payload, and JSON of ours beside it, are as they were written, and agree.

    A payload of an older version has its facts in the JSON alone, and must have its digest.
    """
    try:
        fields = read(payload.with_suffix(".json"))
        facts = header_facts(payload)
    except (ValueError, OSError) as error:
        return Checked(None, str(error))
    if fields is None:
        return Checked(facts)
    if facts is None:
        digest, recorded = sha256(payload), str(fields.get("sha256"))[:64]
        wrong = None if recorded == digest else f"SHA-256 {digest}, recorded {recorded!r}"
        return Checked(fields, wrong)
    apart = sorted(key for key in facts if _lasting(fields.get(key)) != facts[key])
    if not apart:
        return Checked(fields)
    return Checked(facts, None, f"{payload.stem}.json is another model's ({', '.join(apart[:5])})")


def _lasting(value: Any) -> Any:
    """The value without any ``seconds``, which the JSON alone has: same seed, same file."""
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key != "seconds"}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def _digest(fields: Mapping[str, Any]) -> str:
    try:
        return hashlib.sha256(dump_json(fields)).hexdigest()
    # NaN and infinity, which Python reads and dump_json() does not write.
    except ValueError:
        return ""
