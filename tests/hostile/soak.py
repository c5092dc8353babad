"""Many epochs of one small run, its state written after each: the memory does not grow."""

import os
import sys
import tempfile
from pathlib import Path

from purify_cases import make_batches, make_model, quick

from . import alone
from .records import row


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth_percent(epochs, settled, leaks=False):
    """How much more memory is in use after the last epoch than after that one.

    In a process of its own: what others have freed there would hide a leak.
    """
    return float(alone.printed("soak", epochs, settled, *(["leak"] if leaks else [])))


def measure(epochs, settled, leaks):
    seen, kept = {}, []

    def look(record, model):
        if leaks:
            # 1 MiB an epoch, written to so that it is there.
            kept.append(b"x" * 2**20)
        seen[record.epoch] = resident_bytes()

    with tempfile.TemporaryDirectory() as folder:
        quick(
            *(make_model(), make_batches(2)),
            alpha=0.1,
            epochs=epochs,
            resume=folder,
            callbacks=[look],
        )
    return 100 * (seen[epochs] - seen[settled]) / seen[settled]


def rows(full):
    """A line for the table of docs/reliability.md."""
    epochs, settled = (1000, 100) if full else (60, 30)
    growth = round(growth_percent(epochs, settled), 2)
    return [row(f"epochs of one run: % of growth in memory after {settled}", epochs, growth, 1)]


if __name__ == "__main__":
    print(measure(int(sys.argv[1]), int(sys.argv[2]), "leak" in sys.argv))
