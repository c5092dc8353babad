"""The report's plots: curves by epoch, and points by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from . import svg
from .text import clean, number, short

WIDTH = 290.0
# The row of one class is so high, in points.
ROW = 15.0
NAN = float("nan")


def curve(history: Sequence[Mapping[str, float | None]], entry: str, title: str) -> Markup:
    """One entry of the history by epoch; an accuracy in percent."""
    factor = 100.0 if entry == "clean_accuracy" else 1.0
    epochs = [_or_nan(row["epoch"]) for row in history]
    values = [factor * _or_nan(row[entry]) for row in history]
    drawn, axes = svg.figure(WIDTH, 160)
    axes.plot(epochs, values, color=svg.AFTER, linewidth=1.6, marker="o", markersize=2.6)
    axes.set_xlabel("epoch", color=svg.MUTED, fontsize=9)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=7, integer=True)
    axes.grid(visible=False, axis="x")
    axes.margins(x=0.02)
    known = [value for value in values if value == value]
    ends = f": {short(known[0])} at first, {short(known[-1])} at last" if known else ""
    return svg.inline(drawn, f"curve-{entry}", f"{title} by epoch{ends}")


def dots(
    name: str,
    title: str,
    labels: Sequence[str],
    before: Sequence[float | None] | None,
    after: Sequence[float | None],
    limits: tuple[float, float] | None = None,
) -> Markup:
    """One line for each class: where it was, if known (a ring), and where it is (a disc).

    Args:
        name: unique on the page.
        title: what is drawn, for those who do not see it.
        labels: of the classes, from the top.
        before, after: their values; None is not drawn.
        limits: of the values, where they are not to follow from them.
    """
    places = list(range(len(labels)))
    ends = [_or_nan(value) for value in after]
    drawn, axes = svg.figure(WIDTH, 34 + ROW * len(labels))
    if before is not None:
        starts = [_or_nan(value) for value in before]
        axes.hlines(places, starts, ends, color=svg.MUTED, linewidth=1.1)
        axes.plot(
            *(starts, places, "o"),
            **{"markersize": 6.5, "markeredgewidth": 1.6},
            **{"markerfacecolor": svg.PAPER, "markeredgecolor": svg.BEFORE, "clip_on": False},
        )
    axes.plot(ends, places, "o", markersize=5.2, color=svg.AFTER, clip_on=False)
    # Names are text, and no formulas.
    shown = [clean(label, 18) for label in labels]
    axes.set_yticks(places, shown, parse_math=False, color=svg.INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(visible=False, axis="y")
    if limits is not None:
        axes.set_xlim(*limits)
    known = [value for value in ends if value == value]
    span = f", from {number(min(known))} to {number(max(known))}" if known else ""
    return svg.inline(drawn, name, f"{title} by class{span}; the table has every number")


def _or_nan(value: float | None) -> float:
    return NAN if value is None else float(value)
