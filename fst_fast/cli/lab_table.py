"""``fst-fast lab table``: the evidence as one command that can be ended and resumed."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bench import table
from ..bench.records import default_folder
from ..data import sources
from ..data.batches import PRECISIONS, resolve_device, resolve_precision
from ..lab.attacks import CLEAN
from ..lab.spec import Order, training_precision
from ..lab.suspect_store import SuspectStore
from ..sweep import tables
from ..sweep.choice import Choice
from ..sweep.grid import GridProgress
from ..sweep.presets import METHODS, PRESETS, Preset
from ..sweep.store import Record, claimed
from ..sweep.table import EvidenceTable, TablePlan
from ..tuning.autotune import threads_of


def add_command(commands: Any) -> None:
    """Add the command to the sub-parsers of ``lab``."""
    parser = commands.add_parser(
        "table", help="attacks x rates x methods x seeds as one record; resumes"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="with train and test images; default: digits"
    )
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--name", help="of the record; default: the preset's")
    parser.add_argument("--attacks", nargs="+", metavar="NAME")
    parser.add_argument("--rates", nargs="+", type=float, metavar="RATE", help="poisoned shares")
    parser.add_argument("--arch", metavar="NAME[:WIDTH]")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=METHODS,
        metavar="NAME[:ALPHA][,SETTING=VALUE]",
        help="settings of the method, or epochs, lr and momentum of its run",
    )
    for name, text in (
        ("seeds", "of each purification"),
        ("epochs", "of tuning"),
        ("clean-images", "of the defender"),
        ("train-images", "train on so many only"),
        ("test-images", "measure on so many only"),
        ("train-epochs", "of the suspects"),
        ("batch-size", "of training and tuning"),
        ("search", "as for lab train"),
        ("size", "resize and centre-crop to this many pixels"),
        ("threads", "of PyTorch, on a CPU"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument("--qra", action="store_true", help="query-based reactivation as well")
    parser.add_argument("--normalize", help="default: the images' own statistics")
    parser.add_argument("--models", type=Path, default=Path("out/lab"), help="folder of suspects")
    parser.add_argument(
        "--out", type=Path, help="folder of records; default: benchmarks/results of the source tree"
    )
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Do what is left of the table, and show it; Ctrl-C is no error."""
    device = resolve_device(options.device, nn.Identity())
    preset = _preset(options)
    splits = sources.read(options.data, options.size)
    if splits.test is None:
        raise ValueError(f"--data must hold train and test images, got {options.data}")
    splits = splits.shortened(preset.train_images, preset.test_images)
    with threads_of(options.threads):
        plan = _plan(options, preset, splits, device)
    suspects = SuspectStore(options.models, splits.train, device, tell)
    for order in plan.orders:
        suspects.check(order)
    try:
        with claimed(options.models, wait=False) as mine:
            if not mine:
                raise ValueError(
                    "--models must be a folder that no other table is at work in, got "
                    f"{options.models}; wait for that one or name another"
                )
            name = options.name or options.preset
            record = Record.open(options.out or default_folder(), name, plan.facts(splits), device)
            grid = EvidenceTable(plan, splits, suspects, record)
            with threads_of(grid.threads), GridProgress(grid, True) as progress:
                grid.fill(progress)
    except KeyboardInterrupt:
        print("fst-fast lab table: stopped; the same command goes on", file=sys.stderr)
        return 1
    table.show(*tables.by_suspect(record.content), lines=[tables.about(record.content)])
    table.show(*tables.by_method(record.content))
    print(f"wrote {record.path}")
    return 0


def _preset(options: argparse.Namespace) -> Preset:
    given = {field.name: getattr(options, field.name) for field in fields(Preset)}
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in ("attacks", "rates"):
        if name in chosen:
            chosen[name] = tuple(chosen[name])
    for name, value in chosen.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    return replace(PRESETS[options.preset], **chosen)


def _plan(
    options: argparse.Namespace, preset: Preset, splits: sources.Splits, device: torch.device
) -> TablePlan:
    normalize = options.normalize or splits.normalize
    orders = [
        Order(
            attack,
            preset.arch,
            rate,
            epochs=preset.train_epochs,
            batch_size=preset.batch_size,
            precision=training_precision(options.precision, device),
            flip=splits.flip,
            normalize=normalize,
            search=options.search,
        )
        for attack, rate in _attacked(preset)
    ]
    return TablePlan(
        orders=tuple(orders),
        choices=tuple(Choice.of(text) for text in options.methods),
        seeds=preset.seeds,
        epochs=preset.epochs,
        batch_size=preset.batch_size,
        clean_images=preset.clean_images,
        queries=options.qra,
        precision=resolve_precision(options.precision, device),
        threads=torch.get_num_threads(),
    )


def _attacked(preset: Preset) -> list[tuple[str, float | None]]:
    """The model without any attack, then each attack, rate by rate: a part tells of all attacks."""
    attacks = [name for name in dict.fromkeys(preset.attacks) if name != CLEAN]
    rated = ((name, rate) for rate in dict.fromkeys(preset.rates) for name in attacks)
    return [(CLEAN, None), *rated]


def tell(line: str) -> None:
    """Show what is being done."""
    print(f"lab: {line}", file=sys.stderr, flush=True)
