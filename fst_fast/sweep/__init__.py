"""Checkpoints x methods x alphas x seeds as one job that can be ended at any moment.

One concern to a file: ``config`` reads the YAML file, ``plan`` makes cells of it, ``folder`` keeps
what is done, ``cells`` does one, ``run`` does them all, ``report`` shows them.
"""

from .run import run_sweep

__all__ = ["run_sweep"]
