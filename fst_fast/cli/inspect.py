"""``fst-fast inspect``: what a model file holds, without loading it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..checkpoints.inspect_file import inspect_file

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, help=".safetensors, .pt, .pth, another pickle, or a folder"
    )
    parser.add_argument("--json", action="store_true", help="everything, for machines")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 1 where the file would be refused."""
    facts = inspect_file(options.file)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        # Every name in it is the file's author's.
        print("\n".join(_clean(line) for line in _lines(facts)))
    return 0 if facts["refused"] is None else 1


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"{facts['kind']}, {facts['size_bytes']} bytes, sha256 {facts['sha256']}"]
    if facts["keys"]:
        lines.append(f"state dict under: {' > '.join(facts['keys'])}")
    if facts["beside"]:
        lines.append(f"beside it: {_listed(f'{n} ({k})' for n, k in facts['beside'].items())}")
    if facts["tensors"] is not None:
        lines.append(f"{len(facts['tensors'])} tensors, {facts['parameters']} parameters")
        listed = [f"  {t['name']}  {t['dtype']} {t['shape']}" for t in facts["tensors"]]
        # The last ones are the head's, most often.
        if len(listed) > _SHOWN:
            gap = f"  ... (--json lists all {len(listed)})"
            listed = [*listed[: _SHOWN // 2], gap, *listed[-_SHOWN // 2 :]]
        lines += listed
    if facts["globals"] is not None:
        lines.append("globals that it names (none was called):")
        lines += [f"  {name}: {says}" for name, says in facts["globals"].items()]
    if facts["unread"] is not None:
        lines.append(f"not all globals may be listed: {facts['unread']}")
    lines += _of_manifest(facts)
    verdict = "nothing speaks against loading it"
    if facts["kind"] == "safetensors":
        verdict += " (values not looked at)"
    return [*lines, verdict if facts["refused"] is None else f"refused: {facts['refused']}"]


def _of_manifest(facts: dict[str, Any]) -> list[str]:
    if facts["manifest_fault"] is not None:
        return [f"manifest: does not match: {facts['manifest_fault']}"]
    if facts["manifest"] is None:
        return []
    told = {k: v for k, v in facts["manifest"].items() if isinstance(v, str | int | float)}
    matches = facts["manifest_note"] or "matches"
    return [f"manifest: {matches}; {_listed(f'{name} {value}' for name, value in told.items())}"]


def _listed(items: Any) -> str:
    items = list(items)
    more = f", ... ({len(items)} in all)" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _clean(line: str) -> str:
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in line)
    return text if len(text) <= 2000 else f"{text[:2000]}..."
