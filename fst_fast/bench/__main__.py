"""The same as ``fst-fast bench``."""

import argparse
import sys

from . import options


def main(arguments: list[str] | None = None) -> int:
    """Run a suite; returns the exit status: 0 done, 1 failed or refused, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m fst_fast.bench", description=__doc__)
    options.add_arguments(parser)
    chosen = parser.parse_args(arguments)
    try:
        return options.run(chosen)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fst_fast.bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
