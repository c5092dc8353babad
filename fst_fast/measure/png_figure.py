"""A matplotlib figure that is drawn without a screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png_figure(where: str, width: float, height: float) -> Figure:
    """Return an empty figure, for ``savefig`` as PNG.

    Args:
        where: who draws, for the message.
        width, height: in inches.
    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise RuntimeError(
            f'{where}: needs matplotlib; install it with pip install "fst_fast[lab]"'
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
