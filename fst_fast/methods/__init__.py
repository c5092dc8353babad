"""Tuning methods, one to a file: the file's name is the method's name."""

import importlib
import pkgutil
from typing import Any

from .base import HeadState, Method


def available() -> tuple[str, ...]:
    """The names of all methods, from the files of this folder."""
    return tuple(
        sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    )


def get(name: str, **settings: Any) -> Method:
    """The method of this name with the given settings.

    ``alpha="auto"`` makes "fst" "fst_auto", and is the same as none for any other.

    Raises:
        ValueError: there is no such method, or it does not take one of the settings.
    """
    if settings.get("alpha") == "auto":
        del settings["alpha"]
        name = "fst_auto" if name == "fst" else name
    if name not in available():
        raise ValueError(f"purify: method must be one of {list(available())}, got {name!r}")
    module = importlib.import_module(f".{name}", __name__)
    kinds = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, Method)
        and kind.__module__ == module.__name__
    ]
    (kind,) = kinds
    unknown = sorted(set(settings) - set(kind.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"purify: method {name!r} does not take {', '.join(unknown)}; leave it out"
        )
    return kind(**settings)


__all__ = ["HeadState", "Method", "available", "get"]
