"""Records: where they go, and which sources they are about."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fst_fast
from fst_fast.checkpoints.atomic_files import dump_json, replace_file, strict_json

ROOT = Path(fst_fast.__file__).parents[1]
# A measurement depends on these; a new record beside them leaves them as they are.
SOURCES = ("csrc", "kernels", "fst_fast", "setup.py", "pyproject.toml")


def default_folder() -> Path:
    """benchmarks/results of the source tree, or of the current folder without one."""
    top = ROOT if (ROOT / "benchmarks").is_dir() else Path.cwd()
    return top / "benchmarks" / "results"


def sources(root: Path = ROOT) -> dict[str, Any]:
    """The commit, and whether the sources differ from it; both None outside a git checkout."""
    # An installation inside some other project's checkout must not take that one's commit.
    if _git(root, "ls-files", "--error-unmatch", "fst_fast/__init__.py") is None:
        return {"commit": None, "dirty": None}
    changed = _git(root, "status", "--porcelain", "--", *SOURCES)
    return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": bool(changed)}


def commit_of(record: Mapping[str, Any]) -> str:
    """The commit a record was made at, for people."""
    commit = record["commit"][:7] if record["commit"] else "no commit"
    return f"{commit} with changes" if record["dirty"] else commit


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def finish(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as strict JSON data: NaN and infinity become null."""
    return strict_json(record, "record")


def write_unfinished(record: Mapping[str, Any], folder: Path) -> Path:
    """Write FOLDER/<device>/<suite>.unfinished, for what is cut off; :func:`write` removes it."""
    path = folder / record["device"]["type"] / f"{record['suite']}.unfinished"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, dump_json(finish(record)))
    return path


def write(record: Mapping[str, Any], folder: Path) -> Path:
    """Write FOLDER/<device>/<date>-<commit>-<suite>.json, all or nothing; return its path.

    A record that is there stays: the next of its name is <date>-<commit>-2-<suite>.json.
    """
    commit = (record["commit"] or "unknown")[:7]
    directory = folder / record["device"]["type"]
    directory.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        again = f"-{number}" if number > 1 else ""
        path = directory / f"{record['date']}-{commit}{again}-{record['suite']}.json"
        if not path.exists():
            break
    replace_file(path, dump_json(record))
    (directory / f"{record['suite']}.unfinished").unlink(missing_ok=True)
    return path
