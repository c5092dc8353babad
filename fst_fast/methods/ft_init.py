"""FT-init (Min et al. 2023, section 3): fine-tuning from a re-initialised head."""

from dataclasses import dataclass
from typing import ClassVar

from .base import Method


@dataclass(frozen=True)
class FTInit(Method):
    """Re-initialise the head, then tune every parameter with plain cross-entropy."""

    name: ClassVar[str] = "ft_init"
    reinitializes: ClassVar[bool] = True
