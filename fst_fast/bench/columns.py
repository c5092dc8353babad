"""The columns in the table of each suite's record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from . import table
from .records import commit_of
from .table import error_ratio, percent, size, spread, time

Row = dict[str, Any]
# A heading, and what stands below it, of a variant's row and its case.
Column = tuple[str, Callable[[Row, Row], str]]


def _us(heading: str, key: str = "") -> Column:
    return heading, lambda row, case: time(row[f"{key or heading}_us"])


def _times_as_fast(base: str, heading: str = "") -> Column:
    def text(row: Row, case: Row) -> str:
        ratio = row.get(f"speedup_over_{base}")
        return "" if ratio is None else f"{ratio:.2f}"

    return f"x {heading or base}", text


def _hot(heading: str, text: Callable[[Row], str]) -> Column:
    return heading, lambda row, case: text(row["hot"]) if row["hot"] else ""


def _error(row: Row, case: Row) -> str:
    eager = next((r["errors"] for r in case["variants"] if r["variant"] == "eager"), None)
    return error_ratio(row["errors"], eager)


def _memory(row: Row, case: Row) -> str:
    return "?" if row["peak_extra_bytes"] is None else size(row["peak_extra_bytes"])


def _exact(row: Row, case: Row) -> str:
    if row["differing"]:
        return f"{row['differing']:.0e} differ, by up to {row['levels']:.1g} levels"
    return "" if row["differing"] is None else "every bit"


def _between(heading: str) -> Column:
    return heading, lambda row, case: " - ".join(f"{r:.2f}" for r in row["speedup_range_plain"])


def _rate(heading: str, key: str) -> Column:
    return heading, lambda row, case: spread(row[key])


VARIANT: Column = ("variant", lambda row, case: row["variant"])
PRECISION: Column = ("precision", lambda row, case: row["how"]["precision"])
OF_FLOOR: Column = (
    "of floor's speed",
    lambda row, case: percent(row["floor_us"] / row["p50_us"], 0),
)
LOOP = (
    *(VARIANT, _us("cold"), _us("p20"), _us("p50"), _us("p80"), _times_as_fast("plain")),
    *(_between("by round"), PRECISION, _us("floor"), OF_FLOOR),
)
COLUMNS: dict[str, Sequence[Column]] = {
    "head": (
        ("variant", lambda row, case: row["variant"] + ((row["reason"] and " (inaccurate)") or "")),
        *(_us("p20"), _us("p50"), _us("p80"), _times_as_fast("eager")),
        _hot("hot p50", lambda hot: time(hot["p50_us"])),
        _hot("x eager, hot", lambda hot: f"{hot['speedup_over_eager']:.2f}"),
        *(("error / eager's", _error), ("extra memory", _memory)),
    ),
    "inject": (
        *(VARIANT, _us("p20"), _us("p50"), _us("p80")),
        *(_times_as_fast("pil", "PIL"), _times_as_fast("torch")),
        ("GB/s", lambda row, case: f"{row['gb_per_s']:.2f}"),
        ("of copy's", lambda row, case: percent(case["floor"]["us"] / row["p50_us"], 0)),
        ("same as the reference", _exact),
    ),
    "loop": LOOP,
    "evaluate": LOOP,
    "end2end": (
        *(VARIANT, _us("cold"), _us("warm", "p50"), _us("tuning", "tune")),
        *(_us("measuring", "evaluate"), _times_as_fast("plain"), _between("by seed")),
        _rate("clean accuracy", "clean_accuracy"),
        *(_rate("attack success", "attack_success"), PRECISION, OF_FLOOR),
    ),
}


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
    columns = COLUMNS[record["suite"]]
    sections = []
    for case in record["cases"]:
        title, empty = _title(case), [""] * len(columns)
        rows = [[text(row, case) for _, text in columns] for row in case["variants"]]
        for row in case["refused"]:
            rows.append([f"{row['variant']} refused: {row['reason']}", *empty[1:]])
        # The title has three lines.
        rows += [empty] * (3 - len(rows))
        sections.append([[title[i] if i < 3 else "", *cells] for i, cells in enumerate(rows)])
    notes = [note for case in record["cases"] for note in _notes(case)]
    header = ["case", *(heading for heading, _ in columns)]
    table.show(header, *sections, lines=lines, notes=notes, console=console)


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


def _notes(case: dict[str, Any]) -> list[str]:
    """Return what a case says beside its rows."""
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
