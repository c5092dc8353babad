"""A run's manifest, checked: it may come from a file that anybody wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HISTORY = ("epoch", "loss", "clean_accuracy", "lr", "cosine", "norm", "seconds")


@dataclass(frozen=True)
class Head:
    """The distance that the head moved; its tuples are empty in manifests without them."""

    cosine: float | None
    norm: float | None
    original_norm: float | None
    class_cosines: tuple[float | None, ...]
    class_norms: tuple[float | None, ...]
    class_original_norms: tuple[float | None, ...]


@dataclass(frozen=True)
class Manifest:
    """The manifest that a run left behind.

    Attributes:
        raw: the whole of it.
        settings: as the run resolved them.
        history: one mapping of numbers, or None, for each epoch.
        head: how far it moved.
        seconds: of the run, or None.
        stopped: None for a whole run, else why it ended early.
        classes: names of the classes in order, or empty.
        accuracy: (before, after, on what) as the run measured it, or None.
        warnings: what the run warned of.
    """

    raw: Mapping[str, Any]
    settings: Mapping[str, Any]
    history: tuple[Mapping[str, float | None], ...]
    head: Head
    seconds: float | None
    stopped: str | None
    classes: tuple[str, ...]
    accuracy: tuple[float, float, str] | None
    warnings: tuple[str, ...] = ()


def parse(raw: Any) -> Manifest:
    """Check a manifest and take it apart.

    Raises:
        ValueError: it is not one of a purification, or an entry is of another kind.
    """
    if not isinstance(raw, Mapping) or not {"settings", "history", "head_shift"} <= set(raw):
        raise _wrong("hold settings, history and head_shift", raw)
    history = raw["history"]
    if not isinstance(history, list) or not all(isinstance(row, Mapping) for row in history):
        raise _wrong("hold a list of epochs as history", history)
    rows = tuple({name: _number(row.get(name), name) for name in HISTORY} for row in history)
    stopped = raw.get("stopped")
    return Manifest(
        raw=raw,
        settings=_mapping(raw["settings"], "settings"),
        history=rows,
        head=_head(_mapping(raw["head_shift"], "head_shift")),
        seconds=_number(raw.get("seconds"), "seconds"),
        stopped=None if stopped is None else str(stopped),
        classes=_classes(raw.get("data")),
        accuracy=_accuracy(raw.get("clean_accuracy")),
        warnings=_warnings(raw.get("warnings", [])),
    )


def _head(shift: Mapping[str, Any]) -> Head:
    rows = []
    for name in ("class_cosines", "class_norms", "class_original_norms"):
        values = shift.get(name, ())
        if not isinstance(values, list | tuple):
            raise _wrong(f"hold a list as {name}", values)
        rows.append(tuple(_number(value, name) for value in values))
    if len({len(row) for row in rows}) != 1:
        raise _wrong("give each class one cosine and two norms", [len(row) for row in rows])
    cosine, norm, original = (
        _number(shift.get(name), name) for name in ("cosine", "norm", "original_norm")
    )
    return Head(cosine, norm, original, *rows)


def _classes(data: Any) -> tuple[str, ...]:
    classes = data.get("classes") if isinstance(data, Mapping) else None
    return tuple(map(str, classes)) if isinstance(classes, list | tuple) else ()


def _accuracy(found: Any) -> tuple[float, float, str] | None:
    if not isinstance(found, Mapping):
        return None
    before, after = (_number(found.get(name), name) for name in ("before", "after"))
    if before is None or after is None:
        return None
    return before, after, str(found.get("measured_on"))


def _warnings(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise _wrong("hold a list of texts as warnings", found)
    return tuple(found)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(f"hold named values as {name}", value)
    return value


def _number(value: Any, name: str) -> float | None:
    # Python's bool is an int; a manifest's is not.
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise _wrong(f"hold a number or null as {name}", value)
    try:
        found = None if value is None else float(value)
    except OverflowError:
        return None
    return found if found is not None and math.isfinite(found) else None


def _wrong(expected: str, got: Any) -> ValueError:
    shown = repr(got)
    return ValueError(
        f"report: manifest must {expected}, got {shown[:80]}{'...' * (len(shown) > 80)}; take the "
        ".json that purify wrote beside the weights"
    )
