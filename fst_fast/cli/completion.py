"""``fst-fast completion``: a script that completes commands and options in a shell."""

from __future__ import annotations

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")


def add_command(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Add the command to the sub-parsers of ``parser``, which the script will complete."""
    written = commands.add_parser("completion", help="a script that completes options in a shell")
    written.add_argument("shell", choices=SHELLS)
    written.set_defaults(run=lambda options: run(options, parser))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print the script.

    Raises:
        RuntimeError: shtab is not installed.
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise RuntimeError(
            'needs shtab; install it with pip install "fst_fast[completion]"'
        ) from None
    print(shtab.complete(parser, shell=options.shell))
    return 0
