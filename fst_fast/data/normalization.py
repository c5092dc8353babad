"""Values on the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..triggers.pixels import NORMALIZATIONS, Normalization

__all__ = ["NORMALIZATIONS", "alpha", "graphs", "normalization", "options"]


def alpha(text: str) -> float | str:
    """A number, or "auto"."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}") from None


def graphs(text: str) -> bool | int | str:
    """auto, on, off, or a number."""
    known: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
    try:
        return known[text] if text in known else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be auto, on, off or a number, got {text!r}"
        ) from None


def normalization(text: str) -> Normalization | None:
    """A name in NORMALIZATIONS, or means/standard deviations by comma."""
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    try:
        means, stds = ([float(v) for v in part.split(",")] for part in text.split("/"))
    except ValueError:
        raise ValueError(
            f"--normalize must be one of {', '.join(NORMALIZATIONS)}, or means/standard "
            f"deviations like 0.5,0.5,0.5/0.2,0.2,0.2, got {text!r}"
        ) from None
    if min(stds) <= 0:
        raise ValueError(f"--normalize must have standard deviations > 0, got {text!r}")
    return means, stds


def options(pairs: Sequence[str]) -> dict[str, Any]:
    """["width=16", "name=x"] to {"width": 16, "name": "x"}: JSON where it is, else text."""
    out: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"an option must be NAME=VALUE, got {pair!r}")
        try:
            parsed = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            parsed = value
        out[name] = tuple(parsed) if isinstance(parsed, list) else parsed
    return out
