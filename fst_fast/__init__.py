"""fst_fast: remove backdoors from image classifiers with Feature Shift Tuning."""

from __future__ import annotations

import importlib
from typing import Any

from . import heads, methods, ops, triggers
from .checkpoints import LoadError, load
from .data.augment import Augment
from .data.device_loader import DeviceLoader
from .measure.evaluate import Metrics, evaluate
from .methods.criterion import HeadDeviationLoss
from .methods.projection import attach
from .tuning.compare import Compared, Comparison, compare
from .tuning.distributed import LostRankError
from .tuning.many import Outcome, purify_many
from .tuning.purify import purify
from .tuning.result import HeadShift, PurifyResult
from .tuning.search import search
from .tuning.search_candidates import Candidate
from .tuning.search_result import SearchResult

__version__ = "0.2.0"

__all__ = [
    "Augment",
    "Candidate",
    "Compared",
    "Comparison",
    "DeviceLoader",
    "HeadDeviationLoss",
    "HeadShift",
    "LoadError",
    "LostRankError",
    "Metrics",
    "Outcome",
    "PurifyResult",
    "SearchResult",
    "attach",
    "compare",
    "evaluate",
    "heads",
    "lab",
    "load",
    "methods",
    "ops",
    "purify",
    "purify_many",
    "search",
    "triggers",
]


def __getattr__(name: str) -> Any:
    """Import ``fst_fast.lab`` at its first use: purifying does not need it."""
    if name == "lab":
        return importlib.import_module(".lab", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
