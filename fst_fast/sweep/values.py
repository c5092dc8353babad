"""Checks of single values of a configuration: each names what it expects, and how to mend it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..data.normalization import NORMALIZATIONS
from ..triggers.pixels import Normalization

T = TypeVar("T")
Check = Callable[[Any], T]


class Unfit(Exception):  # noqa: N818
    """A value is not as expected; the words for what was, and for the remedy."""

    def __init__(self, expected: str, remedy: str = "") -> None:
        super().__init__(expected)
        self.expected, self.remedy = expected, remedy


class Keys:
    """The keys of one mapping, to be taken one by one; those left at the end are unknown.

    Args:
        given: what the YAML file holds.
        file: its name, for errors.
        inside: the key that holds the mapping, such as "checkpoints[1]"; "" at the top.
    Raises:
        ValueError: not a mapping; and from the methods, whatever does not fit.
    """

    def __init__(self, given: Any, file: str, inside: str = "") -> None:
        self._file, self._inside = file, inside
        if not isinstance(given, Mapping):
            raise ValueError(
                f"sweep: {file}: {inside or 'the file'} must be a mapping of keys to values, got "
                f"{shown(given)}; write one `key: value` to a line"
            )
        self._given = dict(given)
        self._known: list[str] = []

    def required(self, key: str, check: Check[T], example: str) -> T:
        """The value; ValueError where it is absent or does not fit."""
        found = self.optional(key, check, None)
        if found is None:
            raise self.missing(key, example)
        return found

    def optional(self, key: str, check: Check[T], default: T | None) -> T | None:
        """The value; ``default`` where the key is absent or null."""
        self._known.append(key)
        value = self._given.pop(key, None)
        if value is None:
            return default
        try:
            return check(value)
        except Unfit as unfit:
            remedy = unfit.remedy or "correct it"
            raise self.error(key, f"be {unfit.expected}", shown(value), remedy) from None

    def filled(self, key: str, check: Check[T], default: T) -> T:
        """As :meth:`optional`, for a default that is a value."""
        found = self.optional(key, check, default)
        assert found is not None
        return found

    def missing(self, key: str, example: str) -> ValueError:
        """What to raise where a key must be there and is not."""
        return self.error(key, "be given", "nothing", f"add `{key}: {example}`")

    def finish(self) -> None:
        """Refuse what was not asked for."""
        for key in self._given:
            near = difflib.get_close_matches(str(key), self._known, n=1)
            raise self.error(
                str(key),
                f"be one of the keys {', '.join(sorted(self._known))}",
                "an unknown key",
                f"did you mean {near[0]}?" if near else "leave it out",
            )

    def error(self, key: str, expected: str, got: str, remedy: str) -> ValueError:
        """What to raise where a key is not as expected."""
        where = f"{self._inside}.{key}" if self._inside else key
        return ValueError(f"sweep: {self._file}: {where} must {expected}, got {got}; {remedy}")


def shown(value: Any) -> str:
    """A value for an error message, with its kind where that is easily mistaken."""
    if isinstance(value, str):
        return f"the text {value!r}"
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."


def text(value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise Unfit("text", "put it in quotes")
    return value


def boolean(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise Unfit("true or false")
    return value


def one_of(*choices: str) -> Check[str]:
    """One of a few words."""

    def check(value: Any) -> str:
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            raise Unfit(f"one of {', '.join(choices)}", f"did you mean {near[0]}?" if near else "")
        return str(value)

    return check


def whole(least: int) -> Check[int]:
    """A whole number from ``least`` on."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise Unfit(f"a whole number >= {least}", _as_number(value))
        return value

    return check


def number(value: Any) -> float:
    """A finite number, as purify() takes it; it checks the range itself."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unfit("a finite number", _as_number(value))
    return float(value)


def positive(value: Any) -> float:
    """A finite number > 0."""
    if number(value) <= 0:
        raise Unfit("a finite number > 0")
    return float(value)


def fraction(value: Any) -> float:
    """A number in [0, 1)."""
    if not 0 <= number(value) < 1:
        raise Unfit("a number in [0, 1)")
    return float(value)


def alpha(value: Any) -> float | str:
    """A number >= 0, or "auto"."""
    if value == "auto":
        return "auto"
    try:
        least = number(value)
    except Unfit as unfit:
        raise Unfit("a finite number >= 0 or auto", unfit.remedy) from None
    if least < 0:
        raise Unfit("a finite number >= 0 or auto")
    return least


def list_of(check: Check[T]) -> Check[list[T]]:
    """A list with something in it, and nothing twice."""

    def checked(value: Any) -> list[T]:
        if not isinstance(value, list):
            raise Unfit("a list", f"write [{value}]")
        if not value:
            raise Unfit("a list of at least one", "leave the key out for the default, or fill it")
        found = []
        for i, item in enumerate(value):
            try:
                found.append(check(item))
            except Unfit as unfit:
                expected = f"a list, each {unfit.expected} (number {i + 1} is {shown(item)})"
                raise Unfit(expected, unfit.remedy) from None
            if found[-1] in found[:-1]:
                raise Unfit(f"a list with nothing twice ({shown(item)} is)", "leave one out")
        return found

    return checked


def options(value: Any) -> dict[str, Any]:
    """Names to values, for the keyword arguments of something; lists become tuples."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise Unfit("a mapping of names to values", "write {name: value}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}


def normalization(value: Any) -> str | Normalization:
    """A name in NORMALIZATIONS, or [[means], [standard deviations]]; as it was written."""
    if isinstance(value, str) and value in NORMALIZATIONS:
        return value
    expected = f"one of {', '.join(NORMALIZATIONS)} or [[means], [standard deviations]]"
    if not isinstance(value, list) or len(value) != 2:
        raise Unfit(expected)
    try:
        means, stds = ([number(v) for v in part] for part in value)
    except (Unfit, TypeError):
        raise Unfit(expected, "write numbers, such as [[0.5], [0.2]]") from None
    if not means or len(means) != len(stds) or min(stds) <= 0:
        raise Unfit(expected, "as many deviations as means, each > 0")
    return means, stds


def normalization_of(written: str | Normalization) -> Normalization | None:
    """What :func:`normalization` let through, for a DeviceLoader."""
    return NORMALIZATIONS[written] if isinstance(written, str) else written


def _as_number(value: Any) -> str:
    # YAML 1.1 takes 1e-3 for text: it wants a point in it.
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value.strip()):
        return f"write {float(value)!r} or {float(value):.1e}: YAML reads {value} as text"
    return "write it without quotes" if isinstance(value, str) else ""
