"""Write the documents' tables and figures: python benchmarks/tables.py [--check]

They are made of the records under benchmarks/results; the lists of commands, triggers and methods,
of the code.
"""

import re
import sys
import textwrap

from efficacy_tables import attacks, efficacy, evidence, how_well, in_the_lab, suspects, tuned
from figures import FIGURES
from ladder_tables import (
    END2END_HEADER,
    LOOP_HEADER,
    SHARES_HEADER,
    end2end_rows,
    how_fast,
    loop_rows,
    overhead,
    shares_rows,
)
from record_files import ROOT, default_seconds, newest, newest_cases
from reference_tables import commands, method_list, zoo
from speed_figures import measured_cases

from fst_fast.bench.records import commit_of
from fst_fast.bench.table import error_ratio, markdown, size
from fst_fast.bench.table import time as microseconds


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


def item(title, make):
    """An item of a list, in lines of the documents' width."""

    def made():
        text = f"- **{title}** {make()}"
        return textwrap.fill(
            text, 108, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )

    return made


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
    "tuned": tuned,
    "reliability": reliability,
    "commands": commands,
    "triggers": zoo,
    "methods": method_list,
    "how_well": item("How well.", how_well),
    "how_fast": item(
        "How fast.", lambda: how_fast(measured_cases("loop", "loop"), default_seconds())
    ),
    "in_the_lab": in_the_lab,
}


FIGURE_FOLDER = ROOT / "docs" / "figures"


def figure(name, path):
    """The picture, for a document at this path; its alternative text is the figure's label."""
    drawing = FIGURES[name]()
    if drawing is None:
        return "Not yet measured."
    place = "/".join([*[".."] * (len(path.relative_to(ROOT).parts) - 2), "figures", f"{name}.svg"])
    if path.parent == ROOT:
        place = f"docs/figures/{name}.svg"
    return f"![{drawing.label}]({place})"


def fill(text, path):
    """The document with what its marks ask for: tables and texts, or figures."""

    def made(found):
        kind, name = found[1], found[2]
        new = figure(name, path) if kind == "figure" else TABLES[name]()
        return f"<!-- {kind}: {name} -->\n{new}\n<!-- end -->"

    pattern = r"<!-- (table|figure): (\w+) -->\n.*?<!-- end -->"
    return re.sub(pattern, made, text, flags=re.S)


def written():
    """Each generated file by path, with the text that it must have."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = {path: fill(path.read_text(), path) for path in documents}
    for name, make in FIGURES.items():
        drawing = make()
        if drawing is not None:
            found[FIGURE_FOLDER / f"{name}.svg"] = drawing.svg()
    return found


def main():
    stale = {
        path: text
        for path, text in written().items()
        if not path.exists() or path.read_text() != text
    }
    if "--check" in sys.argv:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        return f"not what the records and the code say: {names}; run make figures" if stale else 0
    for path, text in stale.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
