"""A matplotlib figure as inline SVG in the page's own colours and type."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

# Drawn in these, shown in the page's custom properties, which differ between light and dark.
COLOURS = {
    "#000001": "var(--ink)",
    "#000002": "var(--muted)",
    "#000003": "var(--rule)",
    "#000004": "var(--before)",
    "#000005": "var(--after)",
    "#000006": "var(--paper)",
}
INK, MUTED, RULE, BEFORE, AFTER, PAPER = COLOURS
NEEDS = 'report: needs matplotlib; install it with pip install "fst_fast[lab]"'


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of this size in points, and its axes, in the page's style.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise RuntimeError(NEEDS) from None
    drawn = Figure(figsize=(width / 72, height / 72), layout="constrained", facecolor="none")
    FigureCanvasSVG(drawn)
    axes = drawn.add_subplot(facecolor="none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, pad=4)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    return drawn, axes


def inline(drawn: Any, name: str, label: str) -> Markup:
    """The figure as an ``<svg>`` element that refers to nothing outside itself.

    Its text is escaped already, by ElementTree.

    Args:
        drawn: the figure.
        name: unique on the page; every id within begins with it.
        label: what the figure shows, for those who do not see it.
    """
    import matplotlib

    buffer = io.StringIO()
    style = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name})
    with style, warnings.catch_warnings():
        # Names may hold characters that matplotlib's own font lacks, and the browser's has; and
        # numbers may be too large for its ticks.
        warnings.simplefilter("ignore")
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue().encode())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        _tidy(element, name)
    box = root.attrib["viewBox"]
    root.attrib = {"viewBox": box, "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _tidy(element: Any, name: str) -> None:
    """Drop namespaces, which HTML does not need; make ids unique; take the page's colours."""
    element.tag = element.tag.rpartition("}")[2]
    for attribute in list(element.attrib):
        value = element.attrib.pop(attribute)
        short = attribute.rpartition("}")[2]
        if short == "id":
            value = f"{name}-{value}"
        elif short == "href":
            value = f"#{name}-{value[1:]}"
        value = value.replace("url(#", f"url(#{name}-")
        if short == "style":
            value = re.sub(r"#00000[1-6]", lambda found: COLOURS[found[0]], value)
        element.attrib[short] = value
