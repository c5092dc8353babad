"""Checks of a method's settings, which name the setting, its range and its default."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Method


def check_numbers(method: Method, **ranges: tuple[float, float]) -> None:
    """Raise ValueError unless each setting is a finite number from least to most.

    Args:
        ranges: (least, most) of each setting, both included; most may be infinite.
    """
    for setting, (least, most) in ranges.items():
        value = getattr(method, setting)
        # True is 1 to Python, but no number that somebody means.
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (fits and math.isfinite(value) and least <= value <= most):
            bounds = f"in {least}..{most}" if math.isfinite(most) else f">= {least}"
            _refuse(method, setting, f"a number {bounds}")


def check_counts(method: Method, **least: int) -> None:
    """Raise ValueError unless each setting is a whole number, this or greater."""
    for setting, bound in least.items():
        value = getattr(method, setting)
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            _refuse(method, setting, f"an integer >= {bound}")


def _refuse(method: Method, setting: str, expected: str) -> None:
    default = type(method).__dataclass_fields__[setting].default
    raise ValueError(
        f"{method.name}: {setting} must be {expected}, got {getattr(method, setting)!r}; the "
        f"default is {default}"
    )
