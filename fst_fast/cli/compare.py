"""``fst-fast compare``: several methods on one suspect; ``fst-fast methods`` lists them."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from .. import methods, triggers
from ..data import normalization
from ..tuning.compare import compare
from ..tuning.progress import table_console
from . import inputs
from .labels import check
from .measured import answers


def add_commands(commands: Any) -> None:
    """Add both commands to the parser's."""
    many = commands.add_parser("compare", help="several methods on one suspect, as a table")
    inputs.add_model(many)
    inputs.add_data(many)
    many.add_argument("--test", type=Path, required=True, help="clean images to measure on")
    many.add_argument(
        "--methods",
        nargs="+",
        choices=methods.available(),
        metavar="NAME",
        help="default: all of `fst-fast methods`",
    )
    many.add_argument("--trigger", choices=sorted(triggers.ZOO), help="of the attack to measure")
    many.add_argument(
        "--trigger-option", action="append", default=[], metavar="NAME=VALUE", help="JSON value"
    )
    many.add_argument("--target", type=int, default=0, help="the attacker's class")
    many.add_argument("--epochs", type=int, default=10)
    many.add_argument("--lr", type=float, default=0.01)
    many.add_argument("--momentum", type=float, default=0.9)
    many.add_argument("--augment", choices=("none", "cifar"), default="none")
    many.add_argument("--seed", type=int, default=0)
    many.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for table.json, plot.png and what is done, to go on after a stop",
    )
    many.add_argument(
        "--force", action="store_true", help="go on where the labels do not seem to be the model's"
    )
    many.add_argument("--quiet", action="store_true", help="no progress")
    many.set_defaults(run=run)

    known = commands.add_parser("methods", help="the methods: source, cost, needs and settings")
    known.add_argument("--json", action="store_true", help="the table, for machines")
    known.set_defaults(run=show)


def run(options: argparse.Namespace) -> int:
    """Compare, print and write the table; returns 1 where a method failed or was stopped."""
    model, _ = inputs.load_model(options)
    images = inputs.load_images(options, options.data, model)
    test = inputs.load_images(options, options.test, model, "--test")
    trigger = None
    if options.trigger is not None:
        trigger = triggers.get(options.trigger, **normalization.options(options.trigger_option))
    loader = inputs.loader(options, images, shuffle=True)
    check(options, model, answers(model, loader.plain(), options), images)
    table = compare(
        model,
        loader,
        test=inputs.loader(options, test, shuffle=False),
        methods=options.methods,
        trigger=trigger,
        target=options.target,
        folder=options.out,
        epochs=options.epochs,
        lr=options.lr,
        momentum=options.momentum,
        seed=options.seed,
        device=options.device,
        precision=options.precision,
        progress=not options.quiet,
        check=False,
    )
    print(table, end="")
    options.out.mkdir(parents=True, exist_ok=True)
    table.save(options.out / "table.json")
    if trigger is not None:
        try:
            table.plot(options.out / "plot.png")
        except RuntimeError as error:
            print(f"note: {error}", file=sys.stderr)
    print(f"wrote {options.out / 'table.json'}")
    whole = len(table.rows) == len(options.methods or methods.available())
    return 0 if whole and all(row.metrics is not None for row in table.rows) else 1


def show(options: argparse.Namespace) -> int:
    """List the methods."""
    rows = [_row(name) for name in methods.available()]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table("name", "source", "passes a step", "needs", "settings")
    for row in rows:
        settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
        table.add_row(row["name"], row["source"], row["passes"], row["needs"], settings)
    table_console(width=160).print(table, highlight=False)
    return 0


def _row(name: str) -> dict[str, Any]:
    method = methods.get(name)
    kind, settings = type(method), dict(method.settings())
    del settings["method"]
    factor = kind.epochs_factor
    cost = kind.cost if factor == 1 else f"{kind.cost}, in {factor} x the epochs"
    source = (inspect.getdoc(inspect.getmodule(kind)) or "").partition("\n")[0]
    return {
        "name": name,
        "source": source,
        "passes": cost,
        "needs": kind.needs,
        "settings": settings,
    }
