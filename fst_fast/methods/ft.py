"""Vanilla fine-tuning (FT): the baseline that leaves low-rate backdoors in place."""

from dataclasses import dataclass
from typing import ClassVar

from .base import Method


@dataclass(frozen=True)
class FT(Method):
    """Tune every parameter from where it is, with plain cross-entropy."""

    name: ClassVar[str] = "ft"
