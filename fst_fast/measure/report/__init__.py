"""One self-contained HTML page about one purification: no script, no network, no other file."""

from .measured import Measured, Observed, Samples
from .page import check, write

__all__ = ["Measured", "Observed", "Samples", "check", "write"]
