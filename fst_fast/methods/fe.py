"""FE-tuning (Min et al. 2023, section 3): tune the feature extractor under a random head."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import Method


@dataclass(frozen=True)
class FE(Method):
    """Re-initialise the head and keep it; tune everything below with plain cross-entropy."""

    name: ClassVar[str] = "fe"
    reinitializes: ClassVar[bool] = True
    trains: ClassVar[Literal["all", "backbone", "head"]] = "backbone"
