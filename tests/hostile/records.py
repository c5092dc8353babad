"""What the suites found: a record each; benchmarks/tables.py makes docs/reliability.md of them."""

import os
import platform
import time

from fst_fast import checkpoints
from fst_fast.bench.records import default_folder, sources
from fst_fast.checkpoints.atomic_files import dump_json, replace_file, strict_json


def row(what, count, found, limit=0):
    """One line of the table: of ``count`` trials ``found`` went wrong; ``limit`` are allowed.

    ``found`` may also be a measurement, in the unit that ``what`` names, and ``limit`` its bound.
    """
    return {"what": what, "count": count, "found": found, "limit": limit}


def within(row):
    return row["count"] > 0 and row["found"] <= row["limit"]


def write(suite, rows, seconds, folder=None):
    """Write benchmarks/results/hostile/<date>-<suite>.json, all or nothing; return its path."""
    record = {
        "suite": suite,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "time": time.time(),
        "seconds": round(seconds, 1),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": checkpoints.versions(),
        **sources(),
        "rows": rows,
    }
    directory = folder or default_folder() / "hostile"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{record['date']}-{suite}.json"
    replace_file(path, dump_json(strict_json(record, "record")))
    return path
