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
from ..tuning.labels_check import labels_fault
from ..tuning.purify import purify
from . import inputs, inspect, lab, report, sweep
from . import triggers as zoo
from .measured import Answers, answers


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
        "--force", action="store_true", help="go on where the labels do not seem to be the model's"
    )
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
    measure.add_argument(
        "--target",
        type=int,
        help="the attacker's class; default: for each trigger the class most often answered",
    )
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
    images = inputs.load_images(options, options.data, model)
    loader = inputs.loader(options, images, shuffle=True)
    plain = inputs.loader(options, images, shuffle=False)
    validation = None
    if options.validation is not None:
        found = inputs.load_images(options, options.validation, model, "--validation")
        validation = inputs.loader(options, found, shuffle=False)
    judged = plain if validation is None else validation
    before = answers(model, judged, options)
    _check_labels(options, before, images)
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
            "before": before.accuracy,
            "after": after.clean_accuracy,
            "measured_on": "tuning images" if validation is None else str(options.validation),
        },
    )
    _print_outcome(before.accuracy, after.clean_accuracy, images, validation is not None)
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


def _check_labels(
    options: argparse.Namespace, before: Answers, images: image_sets.ImageSet
) -> None:
    """Stop, or with --force warn, where the images' labels cannot be the model's."""
    text = _labels_text(before, images)
    if text is not None and not options.force:
        raise ValueError(f"{text}; --force goes on all the same")
    _warn_of_labels(before, images)


def _warn_of_labels(seen: Answers, images: image_sets.ImageSet) -> None:
    text = _labels_text(seen, images)
    if text is not None:
        print(f"warning: {text}", file=sys.stderr)


def _labels_text(seen: Answers, images: image_sets.ImageSet) -> str | None:
    labels, answered = seen.clean
    fault = labels_fault(labels, answered, len(images.classes), images.classes)
    checks = "check --normalize, --size, --arch, and that the classes are the model's in order"
    if fault is None:
        return None
    return f"--data must have the model's own labels, got {fault}; {checks} (--classes FILE)"


def _evaluate(options: argparse.Namespace) -> int:
    if options.battery and options.trigger is not None:
        raise ValueError("--battery and --trigger must not be given together; leave one out")
    model, _ = inputs.load_model(options)
    images = inputs.load_images(options, options.data, model)
    loader = inputs.loader(options, images, shuffle=False)
    if options.battery:
        named = zoo.battery(images.images)
    elif options.trigger is not None:
        given = normalization.options(options.trigger_option)
        named = {options.trigger: triggers.get(options.trigger, **given)}
    else:
        named = {}
    seen = answers(model, loader, options, named, options.target or 0)
    targets = {
        name: seen.most_answered(name) if options.target is None else options.target
        for name in named
    }
    found = {name: (targets[name], seen.metrics(name, targets[name])) for name in named}
    _warn_of_labels(seen, images)
    if not named:
        print(json.dumps(asdict(seen.metrics()), indent=2) if options.json else seen.metrics())
    elif options.battery:
        zoo.show_battery(found, images.classes, options.target is not None, options.json)
    else:
        zoo.show_one(*found[options.trigger], options.target is not None, options.json)
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
