"""The record of a table of evidence: a file that is whole after every cell, and goes on."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch

from .. import checkpoints
from ..bench import machine, records
from ..checkpoints.atomic_files import dump_json, read_object, replace_file, strict_json
from .plan import differences

# Of a suspect's manifest: what the record holds already, or another file describes.
ELSEWHERE = ("versions", "data", "made_by", "format", "format_version", "payload", "size_bytes")

# What tells two rows of a suspect apart.
CELL = ("method", "alpha", "seed")


class Evidence:
    """What has been measured.

    Args:
        path: of the record.
        content: of it.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def open(
        cls, folder: Path, name: str, settings: dict[str, Any], device: torch.device
    ) -> Evidence:
        """The newest record of this name in the folder that has these settings, or a new one.

        Args:
            folder: holds ``<device>/<date>-efficacy-<name>.json``.
            name: of the table.
            settings: in which two runs of one table agree, but for the seeds: those that the record
                lacks are added to it.
            device: it is done on.
        Raises:
            ValueError: today's record of this name has other settings, or is damaged.
        """
        settings = strict_json(settings, "settings")
        place = machine.describe(device)
        directory = folder / place["type"]
        for path in sorted(directory.glob(f"*-efficacy-{name}.json"), reverse=True):
            kept = _read(path)
            same = not _apart(kept, settings)
            if same and kept["device"]["name"] == place["name"]:
                agreed = kept["settings"]
                agreed["seeds"] = max(agreed["seeds"], settings["seeds"])
                return cls(path, kept)
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        path = directory / f"{date}-efficacy-{name}.json"
        if path.exists():
            apart = _apart(_read(path), settings) or ["device"]
            raise ValueError(
                f"lab table: {path} must be of this table to go on with it, but differs in "
                f"{'; '.join(apart[:5])}; put that back, move it away or give another --name"
            )
        directory.mkdir(parents=True, exist_ok=True)
        return cls(
            path,
            {
                "suite": "efficacy",
                "name": name,
                "date": date,
                **records.sources(),
                "device": place,
                "versions": checkpoints.versions(),
                "settings": settings,
                "suspects": {},
            },
        )

    def begin(self, title: str, manifest: dict[str, Any]) -> None:
        """A suspect, by its manifest; one that is there already stays."""
        facts = {key: value for key, value in manifest.items() if key not in ELSEWHERE}
        self.content["suspects"].setdefault(title, {**facts, "rows": []})

    def row(self, title: str, facts: dict[str, Any]) -> dict[str, Any] | None:
        """The row of a suspect with this method, alpha and seed, or None."""
        for row in self.content["suspects"].get(title, {}).get("rows", []):
            if all(row.get(key) == facts.get(key) for key in CELL):
                return dict(row)
        return None

    def add(self, title: str, row: dict[str, Any]) -> None:
        """Write down a row; the file is whole at every moment."""
        self.content["suspects"][title]["rows"].append(
            {**row, "commit": records.sources()["commit"]}
        )
        self.content = strict_json(self.content, "record")
        replace_file(self.path, dump_json(self.content))


def _apart(kept: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """In what a record is of another table."""
    agreed = kept.get("settings", {})
    seeds = {"seeds": settings["seeds"]} if isinstance(agreed.get("seeds"), int) else {}
    return differences({**agreed, **seeds}, settings)


def _read(path: Path) -> dict[str, Any]:
    found = read_object(path)
    if found is None:
        raise ValueError(f"lab table: {path} must be a record, got a damaged file; move it away")
    return found
