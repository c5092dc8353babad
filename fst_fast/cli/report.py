"""``fst-fast report``: the page about a run whose files are at hand."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .. import checkpoints, triggers
from ..data import class_names, image_sets, normalization
from ..data.device_loader import DeviceLoader
from ..measure import report
from ..measure.per_image import examine
from ..measure.report import Measured
from ..tuning.arguments import to_float32
from ..tuning.result import PurifyResult

# A manifest of a million classes is smaller.
LARGEST = 256 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments to ``parser``."""
    parser.add_argument(
        "checkpoint", type=Path, help="FILE.safetensors of purify; FILE.json must lie beside it"
    )
    parser.add_argument("--out", type=Path, required=True, help="FILE.html to write")
    parser.add_argument("--data", type=Path, help="test images, as for evaluate: measures more")
    parser.add_argument("--suspect", type=Path, help="the checkpoint before purification")
    parser.add_argument("--arch", help="as for purify; needed with --data")
    parser.add_argument("--arch-option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--size", type=int, help="resize and centre-crop to this many pixels")
    parser.add_argument(
        "--normalize", metavar="NAME|MEANS/STDS", help="default: as the manifest says"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--trigger", choices=sorted(triggers.ZOO))
    parser.add_argument("--trigger-option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--target", type=int, default=0, help="the attacker's class")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="of the labels, in order; or a file of them, as for purify",
    )
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")


def run(options: argparse.Namespace) -> int:
    """Write the report of a saved run; with test images, measure first."""
    report.check(options.out)
    manifest = _manifest(options.checkpoint)
    by_name = _listed(options.classes)
    measured = None
    names = options.classes if by_name is None else None
    if options.data is not None:
        measured, found = _measure(options, manifest, by_name)
        names = names or found
    elif options.suspect is not None or options.trigger is not None:
        raise ValueError("--data must be given with --suspect or --trigger: a folder of images")
    report.write(options.out, manifest, measured, names)
    print(f"wrote {options.out}")
    return 0


def suspect_for(options: argparse.Namespace, model: nn.Module) -> nn.Module | None:
    """A copy of the model for the report of ``purify --report``, where it compares the two.

    Raises what stands against writing the report, before anything is tuned.
    """
    if options.report is None:
        return None
    report.check(options.report)
    return None if options.validation is None else copy.deepcopy(model)


def write_after(
    options: argparse.Namespace,
    result: PurifyResult,
    suspect: nn.Module | None,
    validation: DeviceLoader | None,
    manifest: Mapping[str, object],
) -> None:
    """The report of ``purify --report``; class by class only on images that were held out."""
    result.report(
        options.report, test=validation, suspect=suspect, device=options.device, facts=manifest
    )
    print(f"wrote {options.report}")


def _listed(given: list[str] | None) -> dict[str, int] | None:
    """The classes of a file, where --classes names one rather than the classes themselves."""
    if given is None or len(given) != 1 or not Path(given[0]).is_file():
        return None
    return class_names.read_names(Path(given[0]))


def _manifest(path: Path) -> Any:
    """The manifest beside a checkpoint, which it must describe."""
    beside = path.with_suffix(".json")
    try:
        if beside.stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        manifest = json.loads(beside.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"report: {beside} must be a manifest of purify, got: {error}") from None
    digest = checkpoints.sha256(path)
    recorded = manifest.get("sha256") if isinstance(manifest, dict) else None
    if recorded != digest:
        raise ValueError(
            f"report: {beside} must describe {path}, whose sha256 is {digest}, got "
            f"{str(recorded)[:80]}; one of the two was replaced"
        )
    return manifest


def _measure(
    options: argparse.Namespace, manifest: dict[str, Any], names: dict[str, int] | None
) -> tuple[Measured, tuple[str, ...]]:
    # Never taken from the manifest: module:callable runs code, and anybody can write a manifest.
    if options.arch is None:
        raise ValueError("--arch must be given with --data, as for purify")
    normalize = options.normalize or manifest.get("normalize")
    if not isinstance(normalize, str):
        raise ValueError("--normalize must be given: the manifest does not tell it")
    trigger = None
    if options.trigger is not None:
        trigger = triggers.get(options.trigger, **normalization.options(options.trigger_option))
    model = _load(options, options.checkpoint)
    values = normalization.normalization(normalize)
    read = image_sets.read(options.data, options.size)
    labelled = options.data.suffix == ".npz"
    images = class_names.fit_model(read, model, values, names, labelled=labelled)
    loader = DeviceLoader(
        images.images, images.labels, options.batch_size, shuffle=False, normalize=values
    )
    measured = examine(
        model,
        loader,
        suspect=None if options.suspect is None else _load(options, options.suspect),
        trigger=trigger,
        target=options.target,
        device=options.device,
        precision=options.precision,
    )
    return measured, images.classes


def _load(options: argparse.Namespace, path: Path) -> nn.Module:
    settings = normalization.options(options.arch_option)
    model = checkpoints.load(path, options.arch, options.num_classes, **settings)
    to_float32(model)
    return model
