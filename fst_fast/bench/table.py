"""A record as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = (
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
PLAIN_WIDTH = 180
# Below that of float32 a ratio of errors says nothing.
ROUNDING = 6e-8


def show(record: dict[str, Any], console: Console | None = None) -> None:
    """Print one table; plain text where the output is no terminal."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH, color_system=None)
    commit = (record["commit"] or "no commit")[:7] + (" + changes" if record["dirty"] else "")
    lines = [f"{record['device']['name']}, torch {record['versions']['torch']}, {commit}"]
    for row in record["machine"]:
        lines.append(
            f"threads {row['threads']}: copy {row['copy_gb_per_s']:.0f} GB/s, torch.mm fp32 "
            f"{row['fp32_gflop_per_s']:.0f} and bf16 {row['bf16_gflop_per_s']:.0f} GFLOP/s"
        )
    for name, load in record["load_average"].items():
        if load:
            lines.append(f"load average {name}: {load[0]:.2f}")
    table = Table(*COLUMNS)
    for case in record["cases"]:
        for i, cells in enumerate(_rows(case)):
            table.add_row(_title(case)[i] if i < 3 else "", *cells)
        table.add_section()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(table, highlight=False)


def _title(case: dict[str, Any]) -> list[str]:
    shape = ",".join(map(str, case["shape"]))
    threads = f"{case['threads']} thread{'s' * (case['threads'] > 1)}"
    return [
        f"{case['op']}",
        f"{shape} {case['dtype']}, {threads}",
        f"floor {time(case['floor']['us'])}",
    ]


def _rows(case: dict[str, Any]) -> list[list[str]]:
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
    rows += [[f"{row['variant']} refused: {row['reason']}", *[""] * 8] for row in case["refused"]]
    # The title has three lines.
    return rows + [[""] * 9] * (3 - len(rows))


def error_ratio(errors: dict[str, float | None], eager: dict[str, float | None] | None) -> str:
    """The worst of the results' errors, each against eager's own."""
    ratios = []
    for name, error in errors.items():
        measure = None if eager is None else eager[name]
        if error is None or measure is None:
            return "not finite"
        ratios.append(max(error, ROUNDING) / max(measure, ROUNDING))
    return f"{max(ratios):.2g}"


def time(us: float) -> str:
    """12.3 us, 4.56 ms, 7.8 s: three digits."""
    for unit, scale in (("us", 1.0), ("ms", 1e3)):
        if us / scale < 999.5:
            return f"{us / scale:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def size(count: float) -> str:
    """Bytes in MB or GB, as decimal powers."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
