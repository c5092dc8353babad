"""Runs the suites in full, records what they counted; exit status 1 where a limit is passed."""

import importlib
import sys
import time

from . import records

# Modules of this folder, each with rows(full) -> list of records.row().
SUITES = ("files", "images", "crashes", "soak", "guards", "sanitized")


def main(chosen):
    failed = False
    for name in chosen or SUITES:
        start = time.monotonic()
        rows = importlib.import_module(f"{__package__}.{name}").rows(full=True)
        for row in rows:
            over = not records.within(row)
            failed |= over
            print("FAILED" if over else "ok    ", row)
        print(records.write(name, rows, time.monotonic() - start))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
