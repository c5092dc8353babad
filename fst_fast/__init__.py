"""fst_fast: remove backdoors from image classifiers with Feature Shift Tuning."""

from . import heads, methods, ops, triggers
from .augment import Augment
from .checkpoint import LoadError, load
from .data import DeviceLoader
from .drop_in import HeadDeviationLoss
from .evaluate import Metrics, evaluate
from .many import Outcome, purify_many
from .projection import attach
from .purify import purify
from .result import HeadShift, PurifyResult

__version__ = "0.1.0"

__all__ = [
    "Augment",
    "DeviceLoader",
    "HeadDeviationLoss",
    "HeadShift",
    "LoadError",
    "Metrics",
    "Outcome",
    "PurifyResult",
    "attach",
    "evaluate",
    "heads",
    "load",
    "methods",
    "ops",
    "purify",
    "purify_many",
    "triggers",
]
