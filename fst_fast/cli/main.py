"""The command line: ``fst-fast demo | purify | evaluate | sweep | lab | report | bench | ...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import checkpoints, methods, triggers
from ..bench import options as bench
from ..data import image_sets, normalization
from ..lab.demo import run_demo
from ..measure.evaluate import evaluate
from ..ops import backends
from ..tuning import profiling
from ..tuning.purify import purify
from . import inputs, inspect, lab, report, sweep
from . import triggers as zoo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fst-fast {options.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fst-fast", description="Remove backdoors from image classifiers."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="poison, train, purify and measure on digits")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    demo.set_defaults(run=_demo)

    tune = commands.add_parser("purify", help="tune a suspect checkpoint on clean images")
    inputs.add_model(tune)
    inputs.add_data(tune)
    tune.add_argument("--out", type=Path, required=True, help="FILE.safetensors to write")
    tune.add_argument("--validation", type=Path, help="clean images for the reported accuracy")
    tune.add_argument("--method", choices=methods.available(), default="fst")
    tune.add_argument(
        "--alpha",
        type=normalization.alpha,
        default="auto",
        help="weight of FST's <W, W0>, or auto (default)",
    )
    tune.add_argument(
        "--project", action=argparse.BooleanOptionalAction, help="hold the head's norm, or not"
    )
    tune.add_argument("--epochs", type=int, default=10)
    tune.add_argument("--lr", type=float, default=0.01)
    tune.add_argument("--momentum", type=float, default=0.9)
    tune.add_argument("--augment", choices=("none", "cifar"), default="none")
    tune.add_argument("--head", help="qualified name of the classification layer")
    tune.add_argument("--backend", choices=backends.NAMES)
    tune.add_argument("--threads", type=int, help="of PyTorch, on a CPU; default: by a trial")
    tune.add_argument(
        "--graphs",
        type=normalization.graphs,
        default="auto",
        help="on a GPU: auto (default), on, off, or most steps in a CUDA graph, 1 to 16",
    )
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument(
        "--resume", type=Path, help="folder of the run's state, to go on after a stop"
    )
    tune.add_argument("--report", type=Path, metavar="FILE.html", help="write a report as well")
    tune.add_argument("--quiet", action="store_true", help="no progress")
    tune.add_argument(
        "--profile",
        type=Path,
        metavar="FILE.json",
        help="a few steps as a Chrome trace, and shares",
    )
    tune.set_defaults(run=_purify)

    measure = commands.add_parser("evaluate", help="clean accuracy; with a trigger, the attack")
    inputs.add_model(measure)
    inputs.add_data(measure)
    measure.add_argument("--trigger", choices=sorted(triggers.ZOO))
    measure.add_argument(
        "--battery",
        action="store_true",
        help="every trigger that needs nothing given, one by one: where the attack is not known",
    )
    measure.add_argument(
        "--trigger-option", action="append", default=[], metavar="NAME=VALUE", help="JSON value"
    )
    measure.add_argument("--target", type=int, default=0, help="the attacker's class")
    measure.add_argument("--json", action="store_true")
    measure.set_defaults(run=_evaluate)

    page = commands.add_parser("report", help="one HTML page about a purification")
    report.add_arguments(page)
    page.set_defaults(run=report.run)

    shown = commands.add_parser("triggers", help="the attacks' triggers, as a table or a picture")
    zoo.add_arguments(shown)
    shown.set_defaults(run=zoo.run)

    sweep.add_command(commands)

    lab.add_command(commands)

    measured = commands.add_parser("bench", help="time the ops here, each result checked first")
    bench.add_arguments(measured)
    measured.set_defaults(run=bench.run)

    seen = commands.add_parser("inspect", help="what a model file holds, without loading it")
    inspect.add_arguments(seen)

    info = commands.add_parser("info", help="backends, how they were built, what is missing")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)
    return parser


def _demo(options: argparse.Namespace) -> int:
    return run_demo(options.seed, options.out)


def _purify(options: argparse.Namespace) -> int:
    checkpoints.check_writable(options.out)
    model, facts = inputs.load_model(options)
    suspect = report.suspect_for(options, model)
    images = inputs.load_images(options, options.data)
    loader = inputs.loader(options, images, shuffle=True)
    plain = inputs.loader(options, images, shuffle=False)
    validation = None
    if options.validation is not None:
        found = inputs.load_images(options, options.validation)
        validation = inputs.loader(options, found, shuffle=False)
    judged = plain if validation is None else validation
    before = evaluate(model, judged, device=options.device, precision=options.precision)
    method, profile = _method(options), None
    if options.profile is not None:
        profile = profiling.of_run(loader, options.epochs * method.epochs_factor, options.profile)
    result = purify(
        model,
        loader if profile is None else profile,
        method=method,
        epochs=options.epochs,
        lr=options.lr,
        momentum=options.momentum,
        head=options.head,
        validation=validation,
        device=options.device,
        precision=options.precision,
        threads=options.threads,
        graphs=options.graphs,
        backend=options.backend,
        seed=options.seed,
        resume=options.resume,
        progress=not options.quiet,
        inplace=True,
    )
    if profile is not None:
        profile.save(options.profile)
    after = evaluate(result.model, judged, device=options.device, precision=options.precision)
    manifest = result.save(
        options.out,
        **facts,
        data={"path": str(options.data), "images": len(images), "classes": list(images.classes)},
        normalize=options.normalize,
        clean_accuracy={
            "before": before.clean_accuracy,
            "after": after.clean_accuracy,
            "measured_on": "tuning images" if validation is None else str(options.validation),
        },
    )
    _print_outcome(before.clean_accuracy, after.clean_accuracy, images, validation is not None)
    print(f"wrote {options.out} (sha256 {manifest['sha256']})")
    if options.report is not None:
        report.write_after(options, result, suspect, validation, manifest)
    return 0 if result.stopped is None else 1


def _print_outcome(
    before: float, after: float, images: image_sets.ImageSet, validated: bool
) -> None:
    where = "the validation images" if validated else "the tuning images"
    print(f"classes in order: {', '.join(images.classes[:20])}")
    print(
        f"clean accuracy on {where}: {100 * before:.2f} % before, "
        f"{100 * after:.2f} % after; attack success not measured (no trigger)"
    )
    if before < 2 / len(images.classes):
        print(
            "warning: before tuning the model was near chance on these images; check --normalize, "
            "--size, and that the sorted sub-folder names are the model's labels in order",
            file=sys.stderr,
        )


def _evaluate(options: argparse.Namespace) -> int:
    if options.battery and options.trigger is not None:
        raise ValueError("--battery and --trigger must not be given together; leave one out")
    model, _ = inputs.load_model(options)
    images = inputs.load_images(options, options.data)
    loader = inputs.loader(options, images, shuffle=False)
    settings = {"device": options.device, "precision": options.precision}
    if options.battery:
        battery = zoo.battery(images.images)
        found = evaluate(model, loader, battery, options.target, **settings)
        zoo.show_battery(found, options.target, options.json)
        return 0
    trigger = None
    if options.trigger is not None:
        trigger = triggers.get(options.trigger, **normalization.options(options.trigger_option))
    metrics = evaluate(model, loader, trigger, options.target, **settings)
    print(json.dumps(asdict(metrics), indent=2) if options.json else metrics)
    return 0


def _info(options: argparse.Namespace) -> int:
    report: dict[str, Any] = {"versions": checkpoints.versions(), "backends": backends.report()}
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    console = Console()
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    console.print(versions, highlight=False, soft_wrap=True)
    table = Table("backend", "usable", "details")
    for name, row in report["backends"].items():
        details = [
            f"{key}: {_text(value)}"
            for key, value in row.items()
            if value and key not in ("available", "reason")
        ]
        if row["reason"]:
            details.insert(0, str(row["reason"]))
        table.add_row(name, "yes" if row["available"] else "no", "\n".join(details))
    console.print(table, highlight=False)
    return 0


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _method(options: argparse.Namespace) -> methods.Method:
    given = {"alpha": options.alpha, "project": options.project}
    settings = {name: value for name, value in given.items() if value is not None}
    return methods.get(options.method, **settings)
