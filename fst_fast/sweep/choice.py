"""A method of a grid, with the settings that a table gives it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import methods
from ..methods import Method

# Methods of a table that change nothing: the suspect itself, and beside it the model that was
# trained without any attack, shown the suspect's trigger.
NOTHING, UNHARMED = "none", "never backdoored"


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value)


# A method's entry may set these of the run as well: what each must be, in words.
RUN: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1,
        "a whole number >= 1",
    ),
    "lr": (lambda v: _is_number(v) and v > 0, "a finite number > 0"),
    "momentum": (lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
}


@dataclass(frozen=True)
class Choice:
    """A method as a table names it.

    Attributes:
        name: of the method.
        alpha: None for a method without one.
        settings: further ones of the method, or those of :data:`RUN`, as pairs sorted by name; the
            method's own go first where both have the name.
    """

    name: str
    alpha: float | str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, text: str) -> Choice:
        """From "none", "ft", "fst:0.2", "fst:auto" or "d3,fit=2.0,epochs=40".

        Raises:
            ValueError: no such method, or one that takes no alpha or no such setting.
        """
        try:
            return cls._of(text)
        except ValueError as error:
            raise ValueError(
                "lab: methods must be like none, ft, ft_init, fst:0.2, fst:auto or "
                f"d3,fit=2.0,epochs=40, got {text!r}: {error}"
            ) from None

    @classmethod
    def _of(cls, text: str) -> Choice:
        first, *rest = text.split(",")
        name, colon, written = first.partition(":")
        if text == NOTHING:
            return cls(NOTHING)
        settings = dict(_pair(part) for part in rest)
        if not colon or written == "auto":
            # As purify: FST without a number is what alpha="auto" runs.
            name, alpha = methods.get(name, alpha="auto").name, None
        else:
            alpha = float(written)
        found = cls.with_settings(name, settings, alpha)
        found.method()
        return found

    @classmethod
    def with_settings(
        cls, name: str, settings: Mapping[str, Any], alpha: float | str | None = None
    ) -> Choice:
        """Return the choice of a method with these settings; an alpha among them is its alpha.

        Raises:
            ValueError: a setting is neither the method's nor the run's, or out of range.
        """
        given = dict(settings)
        takes = methods.get(name).settings().keys() - {"method"}
        alpha = given.pop("alpha", alpha) if "alpha" in takes else alpha
        for setting, value in given.items():
            if setting in takes:
                continue
            if setting not in RUN:
                raise ValueError(
                    f"{name} has no setting {setting}; its own are {', '.join(sorted(takes))}, and "
                    f"those of the run are {', '.join(RUN)}"
                )
            fits, expected = RUN[setting]
            if not fits(value):
                raise ValueError(f"{setting} must be {expected}, got {value!r}")
        found = cls(name, alpha, tuple(sorted(given.items())))
        found.method()
        return found

    def method(self) -> Method | None:
        """None where nothing is done."""
        if self.name in (NOTHING, UNHARMED):
            return None
        own = dict(self.settings)
        for setting in self.of_run():
            del own[setting]
        return methods.get(
            self.name, **own, **({} if self.alpha is None else {"alpha": self.alpha})
        )

    def of_run(self) -> dict[str, Any]:
        """Return the settings that are arguments of purify, not of the method."""
        if not self.settings:
            return {}
        own = methods.get(self.name).settings()
        return {name: value for name, value in self.settings if name not in own}

    @property
    def written(self) -> str | None:
        """The settings as JSON, or None."""
        return json.dumps(dict(self.settings), default=str) if self.settings else None

    @property
    def digest(self) -> str:
        """A short name of the settings, for a folder."""
        return hashlib.sha256(str(self.written).encode()).hexdigest()[:8]


def _pair(text: str) -> tuple[str, Any]:
    """A name and a value from "name=value", the value as JSON or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"a setting must be like name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
