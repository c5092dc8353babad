"""The zoo on the command line: as a table, as a picture, and all at once on a model."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import triggers
from ..checkpoints.atomic_files import replace_file
from ..lab import gallery
from ..measure.evaluate import Metrics
from ..triggers import Trigger
from ..tuning.progress import table_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments to ``parser``."""
    parser.add_argument("--out", type=Path, help="FILE.png: draw each trigger and what it changes")
    parser.add_argument("--image", type=Path, help="draw them on this image")
    parser.add_argument("--size", type=int, default=gallery.SIDE, help="of the image, in pixels")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--json", action="store_true", help="the table, for machines")


def run(options: argparse.Namespace) -> int:
    """List the zoo or, with --out, draw it."""
    if not 16 <= options.size <= 1024:
        raise ValueError(f"--size must be in 16..1024, got {options.size}; try 32, 64 or 224")
    if options.out is not None and options.out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {options.out}")
    names = gallery.names(options.only)
    image = options.image and gallery.read_image(options.image, options.size)
    if options.out is not None:
        image = gallery.landscape(options.size) if image is None else image
        picture = gallery.draw(gallery.examples(names, image), image)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(options.out, picture)
        print(f"wrote {options.out}")
        return 0
    rows = [_row(name) for name in names]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table("name", "what it is", "in inject", "settings")
    for row in rows:
        settings = [f"{name}={value}" for name, value in row["settings"].items()]
        settings += [f"{name} (must be given)" for name in row["needs"]]
        table.add_row(row["name"], row["summary"], row["family"], ", ".join(settings))
    table_console(width=160).print(table, highlight=False)
    return 0


def _row(name: str) -> dict[str, Any]:
    kind = triggers.ZOO[name]
    needed = gallery.needs(kind)
    summary = (inspect.getdoc(kind) or "").partition("\n")[0]
    settings = {} if needed else kind().describe()
    settings.pop("name", None)
    return {
        "name": name,
        "summary": summary,
        "family": gallery.family(kind),
        "settings": settings,
        "needs": needed,
    }


def battery(images: Tensor) -> dict[str, Trigger]:
    """The zoo's triggers that need nothing given and fit these images [N, H, W, C]."""
    found = {}
    for name, kind in triggers.ZOO.items():
        if gallery.needs(kind):
            continue
        trigger = kind()
        try:
            trigger.apply(images[:1])
        except ValueError:
            # Too large, or for colours.
            continue
        found[name] = trigger
    return found


def show_one(target: int, metrics: Metrics, given: bool, as_json: bool) -> None:
    """Print what one trigger does; without a given target, also the class answered most."""
    if as_json:
        print(json.dumps({**asdict(metrics), "target": target, "target_given": given}, indent=2))
        return
    print(metrics if given else f"{metrics}; target not given: class {target} answered most")


def show_battery(
    found: Mapping[str, tuple[int, Metrics]], classes: Sequence[str], given: bool, as_json: bool
) -> None:
    """A table with the most successful first; it shows published triggers, and no others.

    Args:
        found: of each trigger the target and what was measured of it.
        classes: their names.
        given: whether the target was given, rather than taken from the answers.
    """
    if as_json:
        told = {
            name: {**asdict(metrics), "target": target, "target_given": given}
            for name, (target, metrics) in found.items()
        }
        print(json.dumps(told, indent=2))
        return
    answered = "target" if given else "most often answered"
    table = Table("trigger", answered, "of the other classes' images", "still right")
    for name, (target, metrics) in sorted(
        found.items(), key=lambda item: -(item[1][1].attack_success or 0)
    ):
        rates = (metrics.attack_success, metrics.robust_accuracy)
        label = classes[target] if target < len(classes) else ""
        shown = f"{target}" if label in ("", str(target)) else f"{target} {label}"
        table.add_row(name, shown, *("-" if r is None else f"{100 * r:.1f} %" for r in rates))
    _, any_metrics = next(iter(found.values()))
    console = Console()
    console.print(
        f"clean accuracy {100 * any_metrics.clean_accuracy:.2f} % of {any_metrics.images}; "
        "triggers with their default settings: an attack with another pattern does not show here",
        highlight=False,
    )
    console.print(table, highlight=False)
