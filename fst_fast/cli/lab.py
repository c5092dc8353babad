"""``fst-fast lab``: backdoored models made to order, and what becomes of them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoints
from ..data import image_sets, normalization, sources
from ..data.batches import PRECISIONS, resolve_device
from ..lab import suspect_manifest
from ..lab.attack_metrics import measure_attack, rating, reactivated, woken
from ..lab.attacks import CLEAN, RECIPES
from ..lab.spec import Order, training_precision
from ..lab.suspect_manifest import Suspect
from ..lab.suspect_store import Made, SuspectStore
from ..measure.evaluate import Metrics
from ..triggers.poisoning import RELABEL
from ..tuning.autotune import threads_of
from . import lab_table


def add_command(commands: Any) -> None:
    """Add the command and its own commands to the sub-parsers."""
    lab = commands.add_parser("lab", help="make backdoored models, and attack purified ones")
    inner = lab.add_subparsers(dest="lab_command", required=True)

    train = inner.add_parser("train", help="poison a training set and train a model on it")
    _add_data(train, "train.npz or train/, test.npz or test/ in it; or one such; default: digits")
    train.add_argument("--attack", default="badnets", metavar="NAME", help=", ".join(RECIPES))
    train.add_argument("--trigger-option", action="append", default=[], metavar="NAME=VALUE")
    train.add_argument("--rate", type=float, help="poisoned share; default: the published one")
    train.add_argument("--target", type=int, default=0, help="the attacker's class")
    train.add_argument("--relabel", choices=RELABEL, help="default: as published")
    _add_training(train)
    train.add_argument("--out", type=Path, required=True, help="FILE.safetensors to write")
    train.set_defaults(run=_train)

    judge = inner.add_parser("evaluate", help="measure a lab's checkpoint by its own trigger")
    judge.add_argument("checkpoint", type=Path, help="of lab train; or purified, with --suspect")
    judge.add_argument("--suspect", type=Path, help="the checkpoint that this one was made from")
    _add_data(judge, "its test images, or itself; default: digits")
    judge.add_argument(
        "--clean", type=Path, help="images for --ra and --qra; default: of the training images"
    )
    judge.add_argument("--clean-images", type=int, default=1000, metavar="N")
    judge.add_argument("--ra", action="store_true", help="after the retuning attack as well")
    judge.add_argument("--qra", action="store_true", help="query-based reactivation; runs --ra")
    judge.add_argument("--clean-model", type=Path, help="of lab train --attack none, for --qra")
    judge.add_argument("--json", action="store_true")
    judge.set_defaults(run=_evaluate)

    lab_table.add_command(inner)


def _add_data(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--data", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--size", type=int, help="resize and centre-crop to this many pixels")
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--threads", type=int, help="of PyTorch, on a CPU")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        default="resnet18:16",
        metavar="NAME[:WIDTH]",
        help="resnet18, preactresnet18, vgg19-bn, resnet8, or a torchvision or timm name",
    )
    parser.add_argument("--epochs", type=int, help="of training; default: the attack's")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--train-images", type=int, metavar="N", help="train on so many only")
    parser.add_argument(
        "--normalize", metavar="NAME|MEANS/STDS", help="default: the images' own statistics"
    )
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help="with the crops")
    parser.add_argument(
        "--search", type=int, metavar="N", help="epochs or steps of what is found on a surrogate"
    )
    parser.add_argument("--seed", type=int, default=0)


def _train(options: argparse.Namespace) -> int:
    checkpoints.check_writable(options.out)
    device = resolve_device(options.device, nn.Identity())
    splits = sources.read(options.data, options.size)
    splits = splits.shortened(options.train_images, None, options.seed)
    order = _order(options, splits, device)
    workshop = SuspectStore(options.out.parent, splits.train, device, lab_table.tell)
    workshop.check(order)
    with threads_of(options.threads):
        made = workshop.make(order)
        written = checkpoints.save(options.out, made.model, made.manifest)
        if splits.test is not None:
            found = Suspect.of(made.manifest)
            print(measure_attack(made.model, splits.test, found, device, options.precision))
    _tell_train(options.out, made, written["sha256"])
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    if options.qra and options.clean_model is None:
        raise ValueError("--clean-model must be given with --qra: lab train --attack none makes it")
    device = resolve_device(options.device, nn.Identity())
    suspect = suspect_manifest.read(options.suspect or options.checkpoint)
    splits = sources.read(options.data, options.size)
    test = splits.train if splits.test is None else splits.test
    with threads_of(options.threads):
        model = suspect.load(options.checkpoint)
        found = measure_attack(model, test, suspect, device, options.precision)
        told: dict[str, Any] = {"metrics": asdict(found)}
        if options.suspect is not None:
            before = measure_attack(
                suspect.load(options.suspect), test, suspect, device, options.precision
            )
            told |= {"before": asdict(before), "der": rating(before, found)}
        if options.ra or options.qra:
            told |= _attacked(options, model, suspect, splits, device)
    print(json.dumps(told, indent=2) if options.json else "\n".join(_lines(told)))
    return 0


def _attacked(
    options: argparse.Namespace,
    model: nn.Module,
    suspect: Suspect,
    splits: sources.Splits,
    device: torch.device,
) -> dict[str, Any]:
    """RA and, where it is asked for, QRA."""
    test = splits.train if splits.test is None else splits.test
    if options.clean is not None:
        known = image_sets.read(options.clean, options.size)
    elif splits.test is not None:
        known = splits.shortened(options.clean_images, None).train
    else:
        raise ValueError("--clean must be given with --ra and --qra where --data has no train part")
    retuned = woken(model, known, suspect, device, options.precision)
    told = {"retuned": asdict(measure_attack(retuned, test, suspect, device, options.precision))}
    if options.qra:
        clean = suspect_manifest.read(options.clean_model).load(options.clean_model)
        place = (device, options.precision)
        found = reactivated(model, retuned, clean, known, test, suspect, *place)
        told["reactivated"] = found.rates()
    return told


def _lines(told: dict[str, Any]) -> list[str]:
    """Say for people what was measured."""
    lines = []
    for key, title in (("before", "before"), ("metrics", ""), ("retuned", "after RA")):
        if key in told:
            lines.append(f"{title + ': ' if title else ''}{Metrics(**told[key])}")
    if told.get("der") is not None:
        lines.append(f"defence effectiveness rating {told['der']:.3f}")
    if "reactivated" in told:
        rates = {name: f"{100 * rate:.2f} %" for name, rate in told["reactivated"].items()}
        lines.append(
            f"after QRA: attack success {rates['success']}, without the trigger "
            f"{rates['clean_success']}; the clean model is right on {rates['transfer']}"
        )
    return lines


def _order(options: argparse.Namespace, splits: sources.Splits, device: torch.device) -> Order:
    return Order(
        options.attack,
        options.arch,
        rate=options.rate,
        target=options.target,
        relabel=options.relabel,
        options=normalization.options(options.trigger_option),
        epochs=options.epochs,
        lr=options.lr,
        batch_size=options.batch_size,
        precision=training_precision(options.precision, device),
        flip=splits.flip if options.flip is None else options.flip,
        normalize=options.normalize or splits.normalize,
        seed=options.seed,
        search=options.search,
    )


def _tell_train(path: Path, made: Made, digest: str) -> None:
    facts = made.manifest
    data, trained = facts["data"], facts["trained"]
    if facts["attack"] == CLEAN:
        print(f"clean: trained on {data['images']} images in {trained['seconds']:.0f} s")
    else:
        print(
            f"{facts['attack']}: {facts['poisoned_images']} of {data['images']} images poisoned, "
            f"{facts['relabel']}, target {facts['target']}; trained in {trained['seconds']:.0f} s"
        )
    print(f"wrote {path} (sha256 {digest})")
    print(
        f"fst-fast purify {path} {Suspect.of(facts).network.arguments} --num-classes "
        f"{len(data['classes'])} --normalize {facts['normalize']} --data CLEAN --out PURIFIED"
    )
