"""``fst-fast evaluate``: clean accuracy and, with triggers, the attack."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from .. import triggers
from ..data import normalization
from . import inputs, labels
from . import triggers as zoo
from .measured import answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments to ``parser``."""
    inputs.add_model(parser)
    inputs.add_data(parser)
    parser.add_argument("--trigger", choices=sorted(triggers.ZOO))
    parser.add_argument(
        "--battery",
        action="store_true",
        help="every trigger that needs nothing given, one by one: where the attack is not known",
    )
    parser.add_argument(
        "--trigger-option", action="append", default=[], metavar="NAME=VALUE", help="JSON value"
    )
    parser.add_argument(
        "--target",
        type=int,
        help="the attacker's class; default: for each trigger the class most often answered",
    )
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print; warn where the labels do not seem to be the model's."""
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
    labels.warn(seen, images)
    if not named:
        print(json.dumps(asdict(seen.metrics()), indent=2) if options.json else seen.metrics())
    elif options.battery:
        zoo.show_battery(found, images.classes, options.target is not None, options.json)
    else:
        zoo.show_one(*found[options.trigger], options.target is not None, options.json)
    return 0
