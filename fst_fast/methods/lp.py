"""Linear probing (LP): tune the head alone."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import Method


@dataclass(frozen=True)
class LP(Method):
    """Tune the head alone with plain cross-entropy.

    The backbone stays in eval mode: its features, batch-norm statistics included, do not move.
    """

    name: ClassVar[str] = "lp"
    cost: ClassVar[str] = "none, of the head alone"
    trains: ClassVar[Literal["all", "backbone", "head"]] = "head"
