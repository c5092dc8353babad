"""What the table of each suite's record shows."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from . import table
from .records import commit_of
from .table import error_ratio, percent, size, spread, time

HEAD_COLUMNS = (
    "case",
    "variant",
    "p20",
    "p50",
    "p80",
    "x eager",
    "hot p50",
    "x eager, hot",
    "error / eager's",
    "extra memory",
)
INJECT_COLUMNS = (
    *("case", "variant", "p20", "p50", "p80", "x PIL", "x torch"),
    *("GB/s", "of copy's", "same as the reference"),
)
LOOP_COLUMNS = (
    *("case", "variant", "cold", "p20", "p50", "p80", "x plain", "by round"),
    *("precision", "floor", "of floor's speed"),
)
END2END_COLUMNS = (
    *("case", "variant", "cold", "warm", "tuning", "measuring", "x plain", "by seed"),
    *("clean accuracy", "attack success", "precision", "of floor's speed"),
)


def show(record: dict[str, Any], console: Console | None = None) -> None:
    """Print one table; plain text where the output is no terminal."""
    lines = [
        f"{record['device']['name']}, torch {record['versions']['torch']}, {commit_of(record)}"
    ]
    for row in record["machine"]:
        lines.append(
            f"threads {row['threads']}: copy {row['copy_gb_per_s']:.0f} GB/s, torch.mm fp32 "
            f"{row['fp32_gflop_per_s']:.0f} and bf16 {row['bf16_gflop_per_s']:.0f} GFLOP/s"
        )
    for name, load in record["load_average"].items():
        if load:
            lines.append(f"load average {name}: {load[0]:.2f}")
    columns, make_rows = _SUITES[record["suite"]]
    sections = []
    for case in record["cases"]:
        title, rows = _title(case), make_rows(case)
        # The title has three lines.
        rows += [[""] * (len(columns) - 1)] * (3 - len(rows))
        sections.append([[title[i] if i < 3 else "", *cells] for i, cells in enumerate(rows)])
    notes = [note for case in record["cases"] for note in _notes(case)]
    table.show(columns, *sections, lines=lines, notes=notes, console=console)


def name(case: dict[str, Any]) -> str:
    """The op and, where the suite has any, the family."""
    return f"{case['op']} {case['family']}" if "family" in case else case["op"]


def _title(case: dict[str, Any]) -> list[str]:
    shape = ",".join(map(str, case["shape"]))
    threads = f"{case['threads']} thread{'s' * (case['threads'] > 1)}"
    return [
        name(case),
        f"{shape} {case['dtype']}, {threads}",
        f"floor {time(case['floor']['us'])}",
    ]


def _head_rows(case: dict[str, Any]) -> list[list[str]]:
    eager = next((row["errors"] for row in case["variants"] if row["variant"] == "eager"), None)
    rows = []
    for row in case["variants"]:
        name = row["variant"] + ("" if row["reason"] is None else " (inaccurate)")
        extra = "?" if row["peak_extra_bytes"] is None else size(row["peak_extra_bytes"])
        rows.append(
            [
                name,
                *(time(row[f"{p}_us"]) for p in ("p20", "p50", "p80")),
                f"{row['speedup_over_eager']:.2f}",
                time(row["hot"]["p50_us"]) if row["hot"] else "",
                f"{row['hot']['speedup_over_eager']:.2f}" if row["hot"] else "",
                error_ratio(row["errors"], eager),
                extra,
            ]
        )
    return rows + _refused(case, len(HEAD_COLUMNS))


def _inject_rows(case: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in case["variants"]:
        ratios = [row.get(f"speedup_over_{base}") for base in ("pil", "torch")]
        exact = "" if row["differing"] is None else "every bit"
        if row["differing"]:
            exact = f"{row['differing']:.0e} differ, by up to {row['levels']:.1g} levels"
        rows.append(
            [
                row["variant"],
                *(time(row[f"{p}_us"]) for p in ("p20", "p50", "p80")),
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                f"{row['gb_per_s']:.2f}",
                f"{100 * case['floor']['us'] / row['p50_us']:.0f} %",
                exact,
            ]
        )
    return rows + _refused(case, len(INJECT_COLUMNS))


def _loop_rows(case: dict[str, Any]) -> list[list[str]]:
    rows = [
        [
            row["variant"],
            *(time(row[f"{p}_us"]) for p in ("cold", "p20", "p50", "p80")),
            *_ratio(row),
            row["how"]["precision"],
            time(row["floor_us"]),
            percent(row["floor_us"] / row["p50_us"], 0),
        ]
        for row in case["variants"]
    ]
    return rows + _refused(case, len(LOOP_COLUMNS))


def _end2end_rows(case: dict[str, Any]) -> list[list[str]]:
    rows = [
        [
            row["variant"],
            *(time(row[f"{part}_us"]) for part in ("cold", "p50", "tune", "evaluate")),
            *_ratio(row),
            *(spread(row[name]) for name in ("clean_accuracy", "attack_success")),
            row["how"]["precision"],
            percent(row["floor_us"] / row["p50_us"], 0),
        ]
        for row in case["variants"]
    ]
    return rows + _refused(case, len(END2END_COLUMNS))


def _ratio(row: dict[str, Any]) -> list[str]:
    between = " - ".join(f"{ratio:.2f}" for ratio in row["speedup_range_plain"])
    return [f"{row['speedup_over_plain']:.2f}", between]


def _notes(case: dict[str, Any]) -> list[str]:
    """What a case says beside its rows."""
    lines = []
    for variant, shares in (case.get("shares") or {}).items():
        if shares is not None:
            groups = shares["groups"].items()
            parts = ", ".join(f"{name} {percent(share)}" for name, share in groups)
            lines.append(f"a profiled step of {variant}, {time(shares['step_us'])}: {parts}")
    found = case.get("overhead")
    if found is not None:
        lines.append(
            f"overhead of a step: {percent(found['share'])} ({time(found['step_us'])}, bare "
            f"forward and backward {time(found['forward_backward_us'])})"
        )
    if "before" in case:
        accuracy, success = (
            percent(case["before"][k]) for k in ("clean_accuracy", "attack_success")
        )
        lines.append(
            f"{case['family']} before: clean accuracy {accuracy}, attack success {success}"
        )
    return lines


def _refused(case: dict[str, Any], columns: int) -> list[list[str]]:
    return [
        [f"{row['variant']} refused: {row['reason']}", *[""] * (columns - 2)]
        for row in case["refused"]
    ]


_SUITES = {
    "head": (HEAD_COLUMNS, _head_rows),
    "inject": (INJECT_COLUMNS, _inject_rows),
    "loop": (LOOP_COLUMNS, _loop_rows),
    "evaluate": (LOOP_COLUMNS, _loop_rows),
    "end2end": (END2END_COLUMNS, _end2end_rows),
}
