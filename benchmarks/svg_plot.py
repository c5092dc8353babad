"""Plots as small SVG files: the same bytes on every machine, readable on light and on dark paper.

Every mark has a shape or a place of its own, so that no plot depends on colour. Text and lines have
a middle tone, whose contrast is 4 to 1 on white and on black.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

INK = "#707a85"
RULE = 0.3  # opacity of the lines behind a plot
BLUE = "#2f81d6"
ORANGE = "#d4702a"
GREEN = "#3b9a5f"
PURPLE = "#9a67d0"
ROW = 22
CHARACTER = 7.0  # mean width of a character of 12 pixels


@dataclass(frozen=True)
class Series:
    """A series of a plot has a name in the key, a mark and a colour."""

    name: str
    mark: str
    colour: str = INK
    filled: bool = True


@dataclass
class Panel:
    """Rows with a value for each series, along one axis."""

    title: str
    rows: Sequence[tuple[str, Mapping[str, float]]]
    low: float = 0.0
    high: float = 100.0
    log: bool = False
    ticks: Sequence[tuple[float, str]] = tuple((tick, str(tick)) for tick in range(0, 101, 20))


@dataclass
class Drawing:
    """SVG elements and the size of their picture, in pixels."""

    width: float
    height: float
    label: str
    parts: list[str] = field(default_factory=list)

    def line(self, x1, y1, x2, y2, width=1.0, opacity=RULE):
        ends = f'x1="{x1:.4g}" y1="{y1:.4g}" x2="{x2:.4g}" y2="{y2:.4g}"'
        style = f'stroke="{INK}" stroke-width="{width:g}" stroke-opacity="{opacity:g}"'
        self.parts.append(f"<line {ends} {style}/>")

    def box(self, x, y, width, height, fill, stroke="none"):
        place = f'x="{x:.4g}" y="{y:.4g}" width="{max(width, 0):.4g}" height="{height:.4g}"'
        self.parts.append(f'<rect {place} fill="{fill}" stroke="{stroke}"/>')

    def text(self, x, y, words, anchor="start", colour=INK, bold=False):
        strong = ' font-weight="600"' if bold else ""
        place = f'x="{x:.4g}" y="{y:.4g}" text-anchor="{anchor}" fill="{colour}"{strong}'
        self.parts.append(f"<text {place}>{escape(words)}</text>")

    def mark(self, series: Series, x, y, size=5.0):
        style = f'fill="{series.colour if series.filled else "none"}" stroke="{series.colour}"'
        style += ' stroke-width="1.8"'
        if series.mark == "circle":
            self.parts.append(f'<circle cx="{x:.4g}" cy="{y:.4g}" r="{size:g}" {style}/>')
            return
        points = [f"{x + a * size:.4g} {y + b * size:.4g}" for a, b in MARKS[series.mark]]
        if series.mark in STROKES:
            pairs = zip(points[::2], points[1::2], strict=True)
            path = "".join(f"M{start}L{end}" for start, end in pairs)
        else:
            path = "M" + "L".join(points) + "Z"
        self.parts.append(f'<path d="{path}" {style}/>')

    def svg(self) -> str:
        opening = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" role="img" '
            f'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" font-size="12">'
        )
        return "\n".join([opening, f"<title>{escape(self.label)}</title>", *self.parts, "</svg>\n"])


# Corners in units of the mark's size; of a mark of strokes, the two ends of each.
MARKS = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "diamond": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    "up": [(0, -1.1), (1.1, 0.9), (-1.1, 0.9)],
    "down": [(0, 1.1), (1.1, -0.9), (-1.1, -0.9)],
    "cross": [(-0.9, -0.9), (0.9, 0.9), (-0.9, 0.9), (0.9, -0.9)],
    "plus": [(-1.1, 0), (1.1, 0), (0, -1.1), (0, 1.1)],
    "bar": [(0, -1.3), (0, 1.3)],
}
STROKES = ("cross", "plus", "bar")


def position(value, low, high, start, length, log=False):
    """The place of a value on an axis of this start and length; outside values lie at its ends."""
    if log:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    return start + length * min(max((value - low) / (high - low), 0.0), 1.0)


def key(drawing: Drawing, series: Sequence[Series], x, y):
    """The key of the plot, in lines from (x, y); returns the height it takes."""
    start, top = x, y
    for one in series:
        need = 26 + CHARACTER * len(one.name)
        if x + need > drawing.width and x > start:
            x, y = start, y + 18
        drawing.mark(one, x + 6, y - 4)
        drawing.text(x + 16, y, one.name)
        x += need + 8
    return y - top + 18


def dot_rows(label: str, panels: Sequence[Panel], series: Sequence[Series], columns: int = 1):
    """Panels of rows, each row with a mark for each series."""
    names = [name for panel in panels for name, _ in panel.rows]
    gutter = 14 + CHARACTER * max(map(len, names), default=0)
    # Panels side by side show the same rows; only the first of them names these.
    width = 760.0
    plot = (width - gutter - 24 - 48 * (columns - 1)) / columns
    lines = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    height = 34 + sum(64 + ROW * max(len(p.rows) for p in line) for line in lines)
    drawing = Drawing(width, height, label)
    y = 16 + key(drawing, series, 8, 16)
    for line in lines:
        for at, panel in enumerate(line):
            left = gutter + at * (plot + 48)
            _dots(drawing, panel, series, left, y, plot, named=at == 0)
        y += 64 + ROW * max(len(panel.rows) for panel in line)
    drawing.height = y - 8
    return drawing


def _dots(drawing, panel, series, left, y, plot, named):
    drawing.text(left if not named else 8, y + 4, panel.title, bold=True)
    top, bottom = y + 14, y + 18 + ROW * len(panel.rows)

    def place(value):
        return position(value, panel.low, panel.high, left, plot, panel.log)

    for tick, words in panel.ticks:
        drawing.line(place(tick), top, place(tick), bottom)
        drawing.text(place(tick), bottom + 14, words, "middle")
    for at, (name, values) in enumerate(panel.rows):
        middle = top + ROW * (at + 0.5) + 2
        if named:
            drawing.text(left - 10, middle + 4, name, "end")
        found = [(one, values[one.name]) for one in series if values.get(one.name) is not None]
        if len(found) > 1:
            places = [place(value) for _, value in found]
            drawing.line(min(places), middle, max(places), middle, 1.5, 0.8)
        for one, value in found:
            drawing.mark(one, place(value), middle)
        if not found:
            drawing.text(left + 6, middle + 4, "no attack to measure")


def bars(label: str, groups: Sequence[tuple[str, Sequence[tuple[str, float, str, bool]]]]):
    """Groups of bars: name, length, words behind it, and whether it is filled.

    Each group has a scale of its own: its longest bar is as long as there is room.
    """
    names = [name for _, rows in groups for name, *_ in rows]
    left = 14 + CHARACTER * max(map(len, names), default=0)
    words = [text for _, rows in groups for _, _, text, _ in rows]
    room = 760 - left - 24 - CHARACTER * max(map(len, words), default=0)
    drawing = Drawing(760.0, 0.0, label)
    y = 4.0
    for title, rows in groups:
        y += 18
        drawing.text(8, y, title, bold=True)
        longest = max(length for _, length, *_ in rows)
        for name, length, text, filled in rows:
            y += ROW
            drawing.text(left - 8, y - 1, name, "end")
            extent = room * length / longest
            drawing.box(left, y - 12, extent, 14, BLUE if filled else "none", BLUE)
            drawing.text(left + extent + 8, y - 1, text)
        y += 14
    drawing.height = y
    return drawing


# From nothing to all, each darker than the one before, also without colour.
RAMP = ("#f4efe6", "#f6d9b0", "#f0b878", "#df8d4c", "#b9561f", "#7a2b06")


def heat_map(
    label: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]
):
    """Cells of percentages, darker where there is more."""
    left = 14 + CHARACTER * max(map(len, (name for name, _ in rows)), default=0)
    width = (752 - left) / len(columns)
    drawing = Drawing(760.0, 34 + ROW * len(rows), label)
    for at, name in enumerate(columns):
        drawing.text(left + width * (at + 0.5), 18, name, "middle", bold=True)
    for down, (name, values) in enumerate(rows):
        y = 26 + ROW * down
        drawing.text(left - 8, y + 15, name, "end")
        for at, value in enumerate(values):
            if value is None:
                continue
            shade = min(int(value / 100 * len(RAMP)), len(RAMP) - 1)
            drawing.box(left + width * at + 1, y + 1, width - 2, ROW - 2, RAMP[shade])
            ink = "#ffffff" if shade >= 4 else "#1f2328"
            drawing.text(left + width * (at + 0.5), y + 15, f"{value:.0f}", "middle", ink)
    return drawing


def stacked(label: str, parts: Sequence[str], groups):
    """Groups of bars of one length, each split into shares of 100 %.

    Args:
        parts: names of the shares, in order.
        groups: (title, bars), a bar being (name, words behind it, shares by name).
    """
    names = [name for _, rows in groups for name, *_ in rows]
    left = 14 + CHARACTER * max(map(len, names), default=0)
    room = 760 - left - 90
    drawing = Drawing(760.0, 0.0, label)
    y = 4.0
    for title, rows in groups:
        y += 18
        drawing.text(8, y, title, bold=True)
        for name, words, shares in rows:
            y += ROW + 4
            drawing.text(left - 8, y - 1, name, "end")
            x = left
            for at, part in enumerate(parts):
                extent = room * shares.get(part, 0.0)
                fill, ink = SHADES[at % len(SHADES)]
                drawing.box(x, y - 15, extent, 20, fill)
                if extent > CHARACTER * len(part) + 4:
                    drawing.text(x + extent / 2, y - 1, part, "middle", ink)
                x += extent
            drawing.text(left + room + 8, y - 1, words)
        y += 16
    x = 8.0
    for at, part in enumerate(parts):
        if x + 24 + CHARACTER * len(part) > 752:
            x, y = 8.0, y + 18
        drawing.box(x, y, 12, 12, SHADES[at % len(SHADES)][0])
        drawing.text(x + 17, y + 10, part)
        x += 32 + CHARACTER * len(part)
    drawing.height = y + 20
    return drawing


# Neighbours differ in lightness, so that a bar reads without colour.
SHADES = (
    ("#1f5f9e", "#ffffff"),
    ("#a9cbe8", "#1f2328"),
    ("#b9561f", "#ffffff"),
    ("#f0c48f", "#1f2328"),
    ("#4d7d5c", "#ffffff"),
    ("#bfdcc6", "#1f2328"),
    ("#5d5a78", "#ffffff"),
    ("#d3d0e6", "#1f2328"),
)
