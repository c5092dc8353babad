"""The command line: ``fst-fast demo | search | purify | evaluate | sweep | lab | report | ...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import checkpoints
from ..bench import options as bench
from ..lab.demo import run_demo
from ..ops import backends
from . import compare, completion, evaluate, examples, inspect, lab, purify, report, search, sweep
from . import triggers as zoo

# The status of a process that SIGINT ended, as shells have it.
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 usage, 130 Ctrl-C."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fst-fast {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fst-fast {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="fst-fast", description="Remove backdoors from image classifiers."
    )
    version = f"fst-fast {checkpoints.versions()['fst_fast']}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="poison, train, purify and measure on digits")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    demo.set_defaults(run=_demo)

    looked = commands.add_parser("search", help="look for triggers on a suspect checkpoint")
    search.add_arguments(looked)

    tune = commands.add_parser("purify", help="tune a suspect checkpoint on clean images")
    purify.add_arguments(tune)

    compare.add_commands(commands)

    measure = commands.add_parser("evaluate", help="clean accuracy; with a trigger, the attack")
    evaluate.add_arguments(measure)

    page = commands.add_parser("report", help="one HTML page about a purification")
    report.add_arguments(page)
    page.set_defaults(run=report.run)

    shown = commands.add_parser("triggers", help="the attacks' triggers, as a table or a picture")
    zoo.add_arguments(shown)
    shown.set_defaults(run=zoo.run)

    sweep.add_command(commands)

    lab.add_command(commands)

    measured = commands.add_parser("bench", help="time the ops here, each result checked first")
    bench.add_arguments(measured)
    measured.set_defaults(run=bench.run)

    seen = commands.add_parser("inspect", help="what a model file holds, without loading it")
    inspect.add_arguments(seen)

    info = commands.add_parser("info", help="backends, how they were built, what is missing")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)

    completion.add_command(commands, parser)
    examples.add(commands.choices)
    return parser


def _demo(options: argparse.Namespace) -> int:
    return run_demo(options.seed, options.out)


def _info(options: argparse.Namespace) -> int:
    report: dict[str, Any] = {"versions": checkpoints.versions(), "backends": backends.report()}
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    console = Console()
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    console.print(versions, highlight=False, soft_wrap=True)
    table = Table("backend", "usable", "details")
    for name, row in report["backends"].items():
        details = [
            f"{key}: {_text(value)}"
            for key, value in row.items()
            if value and key not in ("available", "reason")
        ]
        if row["reason"]:
            details.insert(0, str(row["reason"]))
        table.add_row(name, "yes" if row["available"] else "no", "\n".join(details))
    console.print(table, highlight=False)
    return 0


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
