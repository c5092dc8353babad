"""Suspects x methods x seeds as one job that can be ended at any moment.

``config`` reads a sweep's YAML file, ``grid`` does the cells, ``store`` keeps what is done, ``run``
is a sweep, ``table`` the lab's table of evidence.
"""

import importlib
from typing import Any

__all__ = ["run_sweep"]


def __getattr__(name: str) -> Any:
    """Import what checks a configuration at its first use: other commands do without it."""
    if name == "run_sweep":
        return importlib.import_module(".run", __name__).run_sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
