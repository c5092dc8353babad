"""Tuning methods: what is minimised and held, in our loop or in somebody else's."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .anp import ANP
from .base import Batch, Closure, HeadState, Method, Run
from .bna import BNA, Detected, detect_triggered
from .bti_dbf import BTIDBF
from .clp import CLP
from .d3 import D3
from .fe import FE
from .fst import FST
from .fst_auto import FSTAuto
from .ft import FT
from .ft_init import FTInit
from .ft_sam import FTSAM
from .i_bau import IBAU
from .kept import KeptTensors
from .lp import LP
from .npd import NPD
from .pam import PAM
from .rnp import RNP
from .sau import SAU
from .ssft import SSFT
from .trigger_unlearning import TriggerUnlearning
from .tsbd import TSBD

# Every method that has a name. A method's file holds the method's name as ``Method.name``.
_ALL: tuple[type[Method], ...] = (
    *(
        ANP,
        BNA,
        BTIDBF,
        CLP,
        D3,
        FE,
        FST,
        FSTAuto,
        FT,
        FTInit,
        FTSAM,
        IBAU,
        LP,
        NPD,
        PAM,
        RNP,
        SAU,
        SSFT,
    ),
    *(TriggerUnlearning, TSBD),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}


# Other packages name their methods under this group of entry points.
GROUP = "fst_fast.methods"

# ``purify(alpha="auto")`` runs this method.
AUTO = TriggerUnlearning.name


def available() -> tuple[str, ...]:
    """Return the names of all methods, sorted, with those of other packages.

    Example:
        >>> "fst" in fst_fast.methods.available()
        True
    """
    return tuple(sorted({*METHODS, *_installed()}))


def get(name: str, **settings: Any) -> Method:
    """Return the method of this name with the given settings.

    ``alpha="auto"`` makes "fst" the default, "trigger_unlearning", and is the same as none for any
    other.

    Raises:
        ValueError: there is no such method, or it does not take one of the settings.
        RuntimeError: another package's method of this name cannot be loaded.

    Example:
        >>> fst_fast.methods.get("fst", alpha=0.1)
        FST(project=True, alpha=0.1)
    """
    if settings.get("alpha") == "auto":
        del settings["alpha"]
        name = AUTO if name == "fst" else name
    kind = METHODS.get(name) or _load(name)
    unknown = sorted(set(settings) - set(kind.__dataclass_fields__))
    if unknown:
        takes = ", ".join(kind.__dataclass_fields__)
        raise ValueError(
            f"purify: method {name!r} does not take {', '.join(unknown)}; leave it out, or use "
            f"what it takes: {takes}"
        )
    return kind(**settings)


def _installed() -> dict[str, EntryPoint]:
    """The methods of other packages by name; none of them is imported."""
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in METHODS}


def _load(name: str) -> type[Method]:
    """Import the method of another package."""
    entry = _installed().get(name)
    if entry is None:
        raise ValueError(f"purify: method must be one of {list(available())}, got {name!r}")
    try:
        kind = entry.load()
    except Exception as error:
        raise RuntimeError(
            f"purify: method {name!r} of {entry.value} cannot be loaded: {type(error).__name__}: "
            f"{error}; mend or uninstall its package"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Method)) or kind.name != name:
        raise RuntimeError(
            f"purify: method {name!r} must be a subclass of fst_fast.methods.Method of that name, "
            f"got {kind!r} from {entry.value}; mend or uninstall its package"
        )
    return kind


__all__ = [
    "METHODS",
    "Batch",
    "Closure",
    "Detected",
    "HeadState",
    "KeptTensors",
    "Method",
    "Run",
    "available",
    "detect_triggered",
    "get",
]
