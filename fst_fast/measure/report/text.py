"""Numbers and foreign text, as they stand on the page."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
SPACE = "\N{NO-BREAK SPACE}"
LONGEST = 300


def clean(value: object, longest: int = LONGEST) -> str:
    """Text from outside: control, direction and broken characters replaced, cut to a length.

    It is not escaped: the template does that, and plots do.
    """
    text = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c
        for c in str(value)[: longest + 1]
    )
    return text if len(text) <= longest else text[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number with so many decimals; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    # A zero gets no minus.
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}".replace("-", MINUS)


def short(value: float | None) -> str:
    """A number of any size in four significant digits."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:.4g}".replace("-", MINUS)


def percent(rate: float | None) -> str:
    """0.973 as 97.3 %."""
    return NOTHING if rate is None else f"{number(100 * rate, 1)}{SPACE}%"


def points(change: float | None) -> str:
    """-0.012 as a change of percentage points: −1.2."""
    return NOTHING if change is None else number(100 * change, 1, sign=abs(change) >= 0.0005)


def count(value: int) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,}"


def size(bytes_: float) -> str:
    """A file's size."""
    for unit in ("bytes", "kB", "MB"):
        if bytes_ < 1000:
            break
        bytes_, unit = bytes_ / 1000, {"bytes": "kB", "kB": "MB", "MB": "GB"}[unit]
    return f"{bytes_:.0f} bytes" if unit == "bytes" else f"{bytes_:.1f} {unit}"


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate: what is known of it after so many images."""
    z = 1.959964
    rate, weight = successes / trials, z * z / trials
    centre = (rate + weight / 2) / (1 + weight)
    half = z * math.sqrt(rate * (1 - rate) / trials + weight / trials / 4) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """JSON data as (name, text) pairs, the names of nested data joined by dots."""
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in flat(item, _joined(name, key))]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [(name, clean(", ".join(map(_word, value)) or "none", 2000))]
    return [(name, clean(_word(value), 2000))]


def _joined(name: str, key: object) -> str:
    return f"{name}.{clean(key)}" if name else clean(key)


def _word(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
