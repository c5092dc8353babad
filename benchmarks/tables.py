"""Write the tables of the documents from the records: python benchmarks/tables.py [--check]"""

import json
import re
import sys
from pathlib import Path

from ladder_tables import (
    END2END_HEADER,
    LOOP_HEADER,
    SHARES_HEADER,
    end2end_rows,
    loop_rows,
    overhead,
    shares_rows,
)

from fst_fast.bench.records import commit_of
from fst_fast.bench.table import error_ratio, markdown, size
from fst_fast.bench.table import time as microseconds
from fst_fast.sweep import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/alpha.md", "docs/performance.md", "docs/reliability.md")


def newest(pattern):
    """The newest record of each folder and name; names start with their date."""
    paths = sorted(RESULTS.glob(pattern))
    by_name = {(path.parent.name, path.name[len("2026-01-01") :]): path for path in paths}
    return [json.loads(path.read_text()) for path in by_name.values()]


def percent(rate):
    return f"{100 * rate:.1f}"


def efficacy():
    """Clean accuracy / attack success: a row for each suspect, a column for each method."""
    parts = []
    for record in newest("*/*-efficacy-*-images.json"):
        title = f"{record['clean_images']} clean images, {record['date']}, {record['commit'][:7]}:"
        parts.append(f"{title}\n\n{markdown(*tables.by_suspect(record))}")
    return "\n\n".join(parts) or "Not yet measured."


def evidence():
    """What ``fst-fast lab table`` measured: suspect by suspect, and method by method."""
    found = [record for record in newest("*/*-efficacy-*.json") if "settings" in record]
    parts = [
        "\n\n".join(
            [
                f"{tables.about(record)}:",
                markdown(*tables.by_suspect(record)),
                markdown(*tables.by_method(record)),
            ]
        )
        for record in found
    ]
    return "\n\n".join(parts) or "Not yet measured."


def suspects():
    """Classifiers that others trained: clean accuracy / attack success (robust accuracy)."""
    parts = []
    for record in newest("*/*-suspects.json"):
        cells = {}
        for row in record["rows"]:
            cells.setdefault((row["suspect"], row["method"]), []).append(row)
        names = list(dict.fromkeys(name for name, _ in cells))
        methods = list(dict.fromkeys(method for _, method in cells))
        rows = [
            [name, *(suspect_cell(cells.get((name, m), [])) for m in methods)] for name in names
        ]
        protocol = record["protocol"]
        seeds = len({row["seed"] for row in record["rows"]} - {None})
        older = {row["method"]: row["commit"] for row in record["rows"] if "commit" in row}
        named = [f"{method} at {commit[:7]}" for method, commit in older.items()]
        title = (
            f"{protocol['clean_images']} clean images, {protocol['test_images']} test images, "
            f"{seeds} seed{'s' * (seeds != 1)}, {record['date']}, "
            f"{', '.join([commit_of(record), *named])}:"
        )
        parts.append(f"{title}\n\n{markdown(['suspect', *methods], rows)}")
    return "\n\n".join(parts) or "Not yet measured."


def suspect_cell(rows):
    """Means over the seeds; empty where nothing was run."""
    if not rows:
        return ""

    def mean(name):
        return percent(sum(row[name] for row in rows) / len(rows))

    if rows[0]["attack_success"] is None:
        return mean("clean_accuracy")
    attack = f"{mean('attack_success')} ({mean('robust_accuracy')})"
    return f"{mean('clean_accuracy')} / {attack}"


def attacks():
    """Accuracy and attack success of two attacks on one small network."""
    rows = [
        [
            row["trigger"]["name"],
            f"{row['rate']:.1%}",
            percent(row["clean_accuracy"]),
            percent(row["attack_success"]),
        ]
        for record in newest("*/*-attacks.json")
        for row in record["rows"]
    ]
    return markdown(["attack", "poisoned", "clean accuracy", "attack success"], rows)


def heads():
    (record,) = newest("heads/*.json")[-1:]
    verdicts = record["verdicts"]
    rows = []
    for library in ("torchvision", "timm"):
        counts = [verdicts.get(f"{library} {verdict}", 0) for verdict in VERDICTS]
        rows.append([f"{library} {record['versions'][library].split('+')[0]}", *counts])
    return markdown(["library", *VERDICTS], rows)


def reliability():
    """What the suites of tests/hostile counted, each suite's newest record."""
    records = newest("hostile/*.json")
    parts = [
        f"`{record['suite']}`, {record['date']}, {commit_of(record)}, "
        f"{record['seconds'] / 60:.0f} min on {record['machine']['cores']} cores:\n\n"
        + markdown(RELIABILITY_HEADER, [reliability_row(row) for row in record["rows"]])
        for record in records
    ]
    return "\n\n".join(parts) or "Not yet measured."


def reliability_row(row):
    return [row["what"], *(f"{row[name]:,}" for name in ("count", "found", "limit"))]


def inject():
    """One row per trigger family and size, from the newest record of each device."""
    return bench_tables("inject", "inject", INJECT_HEADER, lambda case: [inject_row(case)])


def inject_row(case):
    """Ours is the fastest of our backends."""
    rows = {row["variant"]: row for row in case["variants"]}
    ours = fastest(row for row in rows.values() if row["ours"])
    others = [rows.get(name) for name in ("pil", "torch")]
    rival = fastest(r for r in rows.values() if not r["ours"] and r["variant"] not in BASELINES)
    start = [case["family"], " x ".join(map(str, case["shape"])), case["dtype"], case["threads"]]
    start += [microseconds(row["p50_us"]) if row else "failed" for row in others]
    start.append("" if rival is None else cell(rival))
    if ours is None:
        return [*start, "refused or not available", *[""] * 4]
    ratios = [f"{row['p50_us'] / ours['p50_us']:.0f}" if row else "" for row in others]
    share = f"{100 * case['floor']['us'] / ours['p50_us']:.0f} %"
    return [*start, cell(ours), *ratios, f"{ours['gb_per_s']:.1f}", share]


def loop():
    """The ladder; below it, what a step costs beside its forward and backward pass."""
    return bench_tables("loop", "loop", LOOP_HEADER, loop_rows, overhead)


def evaluation():
    return bench_tables("evaluate", "evaluate", LOOP_HEADER, loop_rows)


def shares():
    """Where the time of a step goes, of plain and of purify as it comes."""
    return bench_tables("loop", "loop", SHARES_HEADER, shares_rows)


def end2end():
    """Time, clean accuracy and attack success of the whole job; refused rows without times."""
    return bench_tables("end2end", "end2end", END2END_HEADER, end2end_rows)


def head():
    """head_deviation_loss, forward and backward."""
    return bench_tables("head", "head_deviation_loss", BENCH_HEADER, lambda c: [bench_row(c)])


def head_step():
    return bench_tables("head", "head_step_", BENCH_HEADER, lambda case: [bench_row(case)])


def bench_tables(suite, op, header, rows_of, note=lambda record: ""):
    """On each device, every case from its newest record; where there is none, that is said."""
    parts = []
    for device, place in DEVICES.items():
        found = []
        for record in newest_cases(device, suite):
            rows = [row for case in record["cases"] if case["op"] == op for row in rows_of(case)]
            if rows:
                found.append(f"{bench_title(record)}\n\n{markdown(header, rows)}")
                found += filter(None, [note(record)])
        parts += found or [f"Not yet measured on a {place}."]
    return "\n\n".join(parts)


def newest_cases(device, suite):
    """The records of a suite, newest first, each with those cases that no newer one has.

    A GPU is shown beside another model of GPU; a CPU gives way to the newest one measured.
    """
    records = [json.loads(p.read_text()) for p in RESULTS.glob(f"{device}/*-{suite}.json")]
    seen = set()
    for record in sorted(records, key=lambda record: record["time"], reverse=True):
        own = record["device"]["name"] if device == "cuda" else None
        cases = [case for case in record["cases"] if (own, case_key(case)) not in seen]
        seen.update((own, case_key(case)) for case in cases)
        yield {**record, "cases": cases}


def case_key(case):
    """Without the number of threads: a case measured anew on another is not shown twice."""
    return case["op"], case.get("family"), *case["shape"], case["dtype"]


def bench_title(record):
    rates = "; ".join(
        f"threads {row['threads']}: copy {row['copy_gb_per_s']:.0f} GB/s, `torch.mm` float32 "
        f"{row['fp32_gflop_per_s']:.0f} and bfloat16 {row['bf16_gflop_per_s']:.0f} GFLOP/s"
        for row in record["machine"]
    )
    versions = f"torch {record['versions']['torch']}, {record['date']}, {commit_of(record)}"
    return f"{record['device']['name']}, {versions}. {rates}."


def bench_row(case):
    """Ours is the fastest of our backends; the rival the fastest of the others that are right."""
    rows = {row["variant"]: row for row in case["variants"]}
    eager = rows.get("eager")
    ours = fastest(row for row in rows.values() if row["ours"])
    rival = fastest(
        row
        for name, row in rows.items()
        if not row["ours"] and row["reason"] is None and name != "eager"
    )
    shape = ", ".join(map(str, case["shape"]))
    start = [shape, case["dtype"], case["threads"], microseconds(case["floor"]["us"])]
    theirs = "" if rival is None else cell(rival)
    if eager is None or ours is None:
        first = "failed" if eager is None else microseconds(eager["p50_us"])
        return [*start, first, theirs, "refused or not available", *[""] * 4]
    hot = f" ({ours['hot']['speedup_over_eager']:.1f})" if ours["hot"] else ""
    return [
        *start,
        microseconds(eager["p50_us"]),
        theirs,
        cell(ours),
        f"{ours['speedup_over_eager']:.1f}{hot}",
        "" if rival is None else f"{rival['p50_us'] / ours['p50_us']:.1f}",
        " / ".join(extra_memory(row, case) for row in (ours, eager)),
        error_ratio(ours["errors"], eager["errors"]),
    ]


def extra_memory(row, case):
    """A share where it means something; the measurement does not resolve small cases."""
    if row["peak_extra_bytes"] is None:
        return "?"
    if case["yardstick_bytes"] < SMALL_BYTES:
        return size(row["peak_extra_bytes"])
    return f"{100 * row['extra_share']:.0f} %"


def fastest(rows):
    return min(rows, key=lambda row: row["p50_us"], default=None)


def cell(row):
    return f"{microseconds(row['p50_us'])} ({row['variant']})"


SMALL_BYTES = 4e6
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
BENCH_HEADER = [
    *("shape", "dtype", "threads", "floor", "eager", "best rival", "ours"),
    *("x eager (in cache)", "x rival", "extra memory, ours / eager", "error, ours / eager"),
]
BASELINES = ("pil", "torch")
INJECT_HEADER = [
    *("trigger", "batch", "dtype", "threads", "PIL", "torch", "best rival", "ours"),
    *("x PIL", "x torch", "GB/s", "of a copy's"),
]
RELIABILITY_HEADER = ["what", "tried", "found", "at most"]
VERDICTS = ("right", "refused", "wrong")
TABLES = {
    "efficacy": efficacy,
    "evidence": evidence,
    "heads": heads,
    "head": head,
    "head_step": head_step,
    "inject": inject,
    "loop": loop,
    "shares": shares,
    "evaluate": evaluation,
    "end2end": end2end,
    "attacks": attacks,
    "suspects": suspects,
    "reliability": reliability,
}


def fill(text):
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, make=make: m[1] + make() + "\n" + m[2], text, flags=re.S)
    return text


def main():
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text()
        after = fill(before)
        if "--check" in sys.argv and before != after:
            return f"{name} is not what the records say; run make tables"
        if before != after:
            path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
