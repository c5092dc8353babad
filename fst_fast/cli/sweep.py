"""``fst-fast sweep``: many checkpoints, methods, alphas and seeds as one job."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import sweep


def add_command(commands: Any) -> None:
    """Add the command to the sub-parsers."""
    parser = commands.add_parser(
        "sweep",
        help="checkpoints x methods x alphas x seeds as one job that can be ended and resumed",
    )
    parser.add_argument("config", type=Path, help="YAML file; docs/sweeps.md describes it")
    parser.add_argument("--retry-failed", action="store_true", help="do failed cells again")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run it; Ctrl-C is no error."""
    try:
        settings = {"retry_failed": options.retry_failed, "quiet": options.quiet}
        return int(sweep.run_sweep(options.config, **settings))
    except KeyboardInterrupt:
        print("fst-fast sweep: stopped; the same command goes on", file=sys.stderr)
        return 1
