"""Numbers of any library as Python's own, so that NumPy's scalars are numbers everywhere."""

from __future__ import annotations

import numbers


def plain_number(value: object) -> int | float | None:
    """The value as an int or a float; None where it is no real number. Bools are no numbers here.

    A whole number stays an int, so that ``whole=True`` may be told from the type.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else None


def whole_number(value: object) -> int | None:
    """The value as an int; None where it is anything else, a float included."""
    found = plain_number(value)
    return found if isinstance(found, int) else None
