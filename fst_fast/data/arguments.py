"""Arguments of public functions as Python's own numbers, or refused by name."""

from __future__ import annotations

import math

from ..triggers.plain_numbers import plain_number, whole_number

# torch.Generator.manual_seed() takes integers between these.
LEAST_SEED, MOST_SEED = -(2**63), 2**64 - 1


def whole(where: str, name: str, value: object, least: int, most: float = math.inf) -> int:
    """The value as an int; NumPy's integers are taken too.

    Raises:
        ValueError: anything else than a whole number in least..most.
    """
    found = whole_number(value)
    if found is None or not least <= found <= most:
        bounds = f">= {least}" if most == math.inf else f"in {least}..{most}"
        raise ValueError(f"{where}: {name} must be an integer {bounds}, got {value!r}")
    return found


def seed(where: str, value: object) -> int:
    """The value as an int that a random generator takes.

    Raises:
        ValueError: it is none.
    """
    found = whole_number(value)
    if found is None or not LEAST_SEED <= found <= MOST_SEED:
        raise ValueError(
            f"{where}: seed must be an integer in -2**63..2**64-1, got {value!r}; the default is 0"
        )
    return found


def number(where: str, name: str, value: object, expected: str) -> int | float:
    """The value as a finite int or float; NumPy's numbers are taken too.

    Args:
        expected: what the error says that the value must be.
    Raises:
        ValueError: no number, NaN or infinite.
    """
    found = plain_number(value)
    if found is None or not math.isfinite(found):
        raise ValueError(f"{where}: {name} must be {expected}, got {value!r}")
    return found
