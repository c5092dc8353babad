"""``fst-fast search``: look for universal triggers on a suspect checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..tuning import search
from ..tuning.progress import table_console
from ..tuning.search_result import SearchResult, row_of
from . import inputs
from .labels import warn
from .measured import answers

# The files in --out, beside the pictures.
_FILE = "candidates.safetensors"
# The table shows so many candidates.
_ROWS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments to ``parser``."""
    inputs.add_model(parser)
    inputs.add_data(parser)
    parser.add_argument(
        "--out", type=Path, help=f"folder for {_FILE}, its manifest, and a picture of each trigger"
    )
    parser.add_argument(
        "--forms", nargs="+", choices=sorted(search.KINDS), default=["mask", "additive", "wave"]
    )
    parser.add_argument(
        "--targets", nargs="+", type=int, metavar="CLASS", help="default: every class, at most 30"
    )
    parser.add_argument("--steps", type=int, default=search.LEAST_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="the candidates, for machines")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Search, print and, with --out, write what was found; the checkpoint is left alone."""
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    model, facts = inputs.load_model(options)
    images = inputs.load_images(options, options.data, model)
    loader = inputs.loader(options, images, shuffle=False)
    warn(answers(model, loader, options), images)
    result = search.search(
        model,
        loader,
        forms=options.forms,
        classes=options.targets,
        steps=options.steps,
        device=options.device,
        precision=options.precision,
        seed=options.seed,
        progress=not options.quiet,
    )
    if options.out is not None:
        data = {"path": str(options.data), "classes": list(images.classes)}
        result.save(options.out / _FILE, **facts, data=data, normalize=options.normalize)
        result.pictures(options.out)
    if options.json:
        print(json.dumps(_plain(result), indent=2))
    else:
        _show(result, images.classes)
        if options.out is not None:
            print(f"wrote {options.out / _FILE} and pictures of the first candidates beside it")
    return 0


def _plain(result: SearchResult) -> dict[str, object]:
    """The result as plain JSON values."""
    return {
        "verdict": str(result),
        "candidates": [
            {**row_of(candidate), "stands_out": candidate.stands_out}
            for candidate in result.candidates
        ],
        "evidence": list(result.evidence),
        "notes": list(result.notes),
        "settings": dict(result.settings),
        "seconds": result.seconds,
    }


def _show(result: SearchResult, classes: Sequence[str]) -> None:
    """A table with the highest score first, and what it does not say."""
    table = Table("class", "form", "size", "success", "at half size", "index", "evidence", "score")
    for candidate in result.candidates[:_ROWS]:
        target = candidate.target
        name = classes[target] if target < len(classes) else ""
        table.add_row(
            f"{target}" if name in ("", str(target)) else f"{target} {name}",
            candidate.form,
            f"{candidate.size:.4f}",
            f"{100 * candidate.success:.0f} %",
            f"{100 * candidate.openness:.0f} %",
            f"{candidate.index:.1f}",
            f"{100 * candidate.evidence:.0f} %",
            f"{candidate.score:.1f}",
            style="bold" if candidate.stands_out else None,
        )
    table_console(width=120).print(table, highlight=False)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(str(result))
    for note in result.notes:
        console.print(f"note: {note}")
    console.print(
        "triggers of other forms were not looked for: this is no proof that there are none"
    )
