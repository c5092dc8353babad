"""Compare two records of one suite: python benchmarks/compare.py A.json B.json

A is what was, B what is. Every variant's median is compared, and, where it stands beside a baseline
of the same run, its ratio to that: the ratio is what carries over between runs on a machine that
others use as well, and decides then. Exit status: 0, or 1 where a variant of ours is slower than
the threshold allows or is no longer there, or 2 for records that cannot be compared.
"""

import argparse
import json
import sys
from pathlib import Path

from fst_fast.bench import table
from fst_fast.bench.table import time as microseconds

THRESHOLD = 1.10
SPEEDUP = "speedup_over_"
# Of the device, what makes the times of two records comparable.
SAME = ("type", "name")
HEADER = ("case", "variant", "A", "B", "B / A", "against the baseline")


class IncomparableError(ValueError):
    """Records that say nothing about each other."""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="B / A of a time (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="compare across devices all the same")
    options = parser.parse_args(arguments)
    try:
        if not options.threshold > 0:
            raise IncomparableError(f"--threshold must be more than 0, got {options.threshold}")
        before, after = (read(path) for path in (options.before, options.after))
        check(before, after, options.force)
        rows = compare(before, after)
    except (OSError, IncomparableError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    show(rows)
    failures = [line for row in rows if (line := failure(row, options.threshold))]
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


def read(path):
    """A record as fst_fast.bench writes it."""
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise IncomparableError(f"{path} must be a record in JSON: {error}") from None
    if not isinstance(record, dict) or not {"suite", "device", "cases"} <= record.keys():
        raise IncomparableError(
            f"{path} must be a record of fst_fast.bench, with a suite and its cases"
        )
    return record


def check(before, after, force):
    """Refuse what would compare unlike things."""
    if before["suite"] != after["suite"]:
        raise IncomparableError(
            f"the records must be of one suite, got {before['suite']} and {after['suite']}"
        )
    devices = [[record["device"].get(key) for key in SAME] for record in (before, after)]
    if devices[0] != devices[1] and not force:
        raise IncomparableError(
            f"the records must be of one device, got {devices[0]} and {devices[1]}; --force "
            "compares them all the same"
        )


def compare(before, after):
    """A row for each variant of each case of A, and of those that only B has."""
    old, new = variants(before), variants(after)
    if not old.keys() & new.keys():
        raise IncomparableError("the records must have a case and a variant in common, got none")
    cases = {case for case, _ in old} & {case for case, _ in new}
    rows = []
    for key in dict.fromkeys([*old, *new]):
        # A case that one record lacks was not asked for there.
        if key[0] in cases:
            rows.append(row_of(key, old.get(key), new.get(key)))
    return rows


def variants(record):
    """{(case, variant): its row}"""
    return {
        (name(case), row["variant"]): row for case in record["cases"] for row in case["variants"]
    }


def name(case):
    parts = [case["op"], case.get("family"), ",".join(map(str, case["shape"])), case["dtype"]]
    threads = f"{case['threads']} thread{'s' * (case['threads'] > 1)}"
    return " ".join(part for part in [*parts, threads] if part)


def row_of(key, old, new):
    case, variant = key
    row = {"case": case, "variant": variant, "ours": (old or new)["ours"], "old": old, "new": new}
    if old is None or new is None:
        return row
    row["times"] = new["p50_us"] / old["p50_us"]
    bases = sorted(k for k in old if k.startswith(SPEEDUP) and k in new)
    # "speedup_over_x" grows as the variant gets faster.
    row["against"] = {k[len(SPEEDUP) :]: old[k] / new[k] for k in bases if old[k] and new[k]}
    return row


def slower(row):
    """How many times as slow as before, by what carries over best."""
    ratios = [ratio for base, ratio in row["against"].items() if base != row["variant"]]
    return max(ratios) if ratios else row["times"]


def failure(row, threshold):
    """Why a row is past the threshold, or None."""
    if not row["ours"]:
        return None
    where = f"{row['case']}, {row['variant']}"
    if row["new"] is None:
        return f"{where}: in the first record only"
    if row["old"] is None or slower(row) <= threshold:
        return None
    return f"{where}: {slower(row):.2f} times as slow as before, {threshold:.2f} is allowed"


def show(rows):
    shown = []
    for row in rows:
        times = [microseconds(r["p50_us"]) if r else "" for r in (row["old"], row["new"])]
        ratios = ["", ""]
        if row["old"] and row["new"]:
            against = ", ".join(f"{base} {ratio:.2f}" for base, ratio in row["against"].items())
            ratios = [f"{row['times']:.2f}", against]
        shown.append([row["case"], row["variant"], *times, *ratios])
    table.show(HEADER, shown)


if __name__ == "__main__":
    sys.exit(main())
