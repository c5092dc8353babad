"""Many epochs of one small run, its state written after each: the memory does not grow."""

import os
import tempfile
from pathlib import Path

from purify_cases import make_batches, make_model, quick

from .records import row


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth_percent(epochs, settled, leak=None):
    """How much more memory is in use after the last epoch than after that one."""
    seen = {}

    def look(record, model):
        if leak is not None:
            leak()
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
