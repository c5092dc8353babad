"""The one printer of tables, for terminals and documents, and how their values are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fst_fast.tuning.progress import table_console

# Below that of float32 a ratio of errors says nothing.
ROUNDING = 6e-8

Rows = Sequence[Sequence[str]]


def show(
    header: Sequence[str],
    *sections: Rows,
    lines: Iterable[str] = (),
    notes: Iterable[str] = (),
    console: Console | None = None,
) -> None:
    """Print a table between lines of text; plain text where the output is no terminal."""
    console = table_console(console, width=200)
    table = Table(*header)
    for rows in sections:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    for part in (*lines, table, *notes):
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """The table as documents have it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(found: dict[str, Any]) -> str:
    """Mean and standard deviation of a rate in 0..1."""
    return f"{100 * found['mean']:.1f} +- {100 * found['std']:.1f} %"


def percent(share: float, digits: int = 1) -> str:
    """0.123 to 12.3 %."""
    return f"{100 * share:.{digits}f} %"


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
