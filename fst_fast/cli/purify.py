"""``fst-fast purify``: tune a suspect checkpoint on clean images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import checkpoints, methods
from ..data import image_sets, normalization
from ..ops import backends
from ..tuning import profiling
from ..tuning.purify import purify
from ..tuning.result import PurifyResult
from . import inputs, launched, report
from .labels import check
from .measured import answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments to ``parser``."""
    inputs.add_model(parser)
    inputs.add_data(parser)
    parser.add_argument("--out", type=Path, required=True, help="FILE.safetensors to write")
    parser.add_argument("--validation", type=Path, help="clean images for the reported accuracy")
    parser.add_argument("--method", choices=methods.available(), default="fst")
    parser.add_argument(
        "--alpha",
        type=normalization.alpha,
        default="auto",
        help="weight of FST's <W, W0>, or auto (default)",
    )
    parser.add_argument(
        "--method-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the method, JSON value",
    )
    parser.add_argument(
        "--project", action=argparse.BooleanOptionalAction, help="hold the head's norm, or not"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps-per-epoch", type=int, metavar="N", help="default: all batches")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--augment", choices=("none", "cifar"), default="none")
    parser.add_argument("--head", help="qualified name of the classification layer")
    parser.add_argument("--backend", choices=backends.NAMES)
    parser.add_argument("--threads", type=int, help="of PyTorch, on a CPU; default: by a trial")
    parser.add_argument(
        "--graphs",
        type=normalization.graphs,
        default="auto",
        help="on a GPU: auto (default), on, off, or most steps in a CUDA graph, 1 to 16",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", type=Path, help="folder of the run's state, to go on after a stop"
    )
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a report as well")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument(
        "--force", action="store_true", help="go on where the labels do not seem to be the model's"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE.json",
        help="a few steps as a Chrome trace, and shares",
    )
    parser.add_argument(
        "--batch-norm",
        choices=("global", "rank"),
        default="global",
        help="under torchrun: statistics of the whole batch (default), or of each rank's rows",
    )
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="of ranks, for each other"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Tune, measure before and after, and write the result; returns 1 where the run was stopped.

    Under torchrun all ranks tune one model together, and the first of them writes.
    """
    with launched.process_group(options.device, options.timeout, "purify") as first:
        return _run(options, first)


def _run(options: argparse.Namespace, first: bool) -> int:
    if first:
        checkpoints.check_writable(options.out)
    model, facts = inputs.load_model(options)
    suspect = report.suspect_for(options, model)
    images = inputs.load_images(options, options.data, model)
    loader = inputs.loader(options, images, shuffle=True)
    validation = None
    if options.validation is not None:
        found = inputs.load_images(options, options.validation, model, "--validation")
        validation = inputs.loader(options, found, shuffle=False)
    # Here the classes have names, and purify's own check need not stop the run again.
    check(options, model, answers(model, loader.plain(), options), images)
    method, profile = _method(options), None
    if options.profile is not None:
        profile = profiling.of_run(loader, options.epochs * method.epochs_factor, options.profile)
    result = purify(
        model,
        loader if profile is None else profile,
        method=method,
        epochs=options.epochs,
        steps_per_epoch=options.steps_per_epoch,
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
        check=False,
        batch_norm=options.batch_norm,
    )
    if not first:
        return 0 if result.stopped is None else 1
    if profile is not None:
        profile.save(options.profile)
    manifest = result.save(
        options.out,
        **facts,
        data={"path": str(options.data), "images": len(images), "classes": list(images.classes)},
        validation=None if options.validation is None else str(options.validation),
        normalize=options.normalize,
    )
    _print_outcome(result, images, options.quiet)
    _print_findings(result, images)
    print(f"wrote {options.out} (sha256 {manifest['sha256']})")
    if options.report is not None:
        report.write_after(options, result, suspect, validation, manifest)
    return 0 if result.stopped is None else 1


def _print_outcome(result: PurifyResult, images: image_sets.ImageSet, quiet: bool) -> None:
    print(f"classes in order: {', '.join(images.classes[:20])}")
    print(
        f"clean accuracy on the {result.measured_on}: {100 * result.before:.2f} % before, "
        f"{100 * result.after:.2f} % after; attack success not measured (no trigger)"
    )
    # Beside a progress bar purify has said them.
    for warning in result.warnings if quiet else ():
        print(f"warning: {warning}", file=sys.stderr)


def _print_findings(result: PurifyResult, images: image_sets.ImageSet) -> None:
    """Say what of each form worked best on the suspect, and what is left of it."""
    best: dict[object, Mapping[str, Any]] = {}
    for found in result.findings:
        best.setdefault(found["form"], found)
    for form, found in best.items():
        target = found["target"]
        name = images.classes[target] if target < len(images.classes) else target
        print(
            f"strongest trigger found, {form}: class {name}, answered for "
            f"{100 * found['before']:.0f} % of other images before and "
            f"{100 * found['after']:.0f} % after"
        )
    if best:
        print("triggers of other forms were not looked for: this is no proof that there are none")


def _method(options: argparse.Namespace) -> methods.Method:
    given = {"alpha": options.alpha, "project": options.project}
    settings = {name: value for name, value in given.items() if value is not None}
    return methods.get(options.method, **settings, **normalization.options(options.method_option))
