"""What each method does to backdoored CIFAR-10 models: trains them, tunes them, writes a record.

python benchmarks/efficacy.py --data FOLDER    (with train.npz and test.npz; see fst_fast.lab.npz)

A trained suspect is kept in --suspects and taken from there the next time. The record is written
after every suspect; started again on the same day, the script goes on with it.
"""

import argparse
import datetime
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import attacks
import torch
from attacks import NORMALIZE, SEED, TARGET

from fst_fast import Augment, DeviceLoader, checkpoint, evaluate, methods, purify, triggers
from fst_fast.bench import machine, records
from fst_fast.files import dump_json, replace_file, strict_json
from fst_fast.lab import datasets, models
from fst_fast.lab.reattack import retune
from fst_fast.lab.suspect import train_suspect
from fst_fast.lab.train import TrainSettings

ROOT = Path(__file__).parents[1]
AUGMENTED = (TrainSettings(epochs=10, lr=0.1, precision="bf16"), Augment(pad=2))
# BATT's own recipe has no augmentation.
PLAIN = (TrainSettings(epochs=15, lr=0.1, precision="bf16"), None)


@dataclass(frozen=True)
class Suspect:
    """How a model was backdoored; ``developed``: alpha="auto" was worked out on it."""

    trigger: Callable[[], triggers.Trigger] | None
    rate: float = 0.0
    training: tuple[TrainSettings, Augment | None] = AUGMENTED
    developed: bool = False


SUSPECTS = {
    "badnets 1%": Suspect(lambda: triggers.BadNets(margin=2), 0.01, developed=True),
    "blended 1%": Suspect(lambda: triggers.Blended(alpha=0.2), 0.01, developed=True),
    "blended 5%": Suspect(lambda: triggers.Blended(alpha=0.2), 0.05),
    "siba 5%": Suspect(lambda: siba(), 0.05, PLAIN),
    "batt 1%": Suspect(triggers.BattRotation, 0.01, PLAIN),
    "batt 5%": Suspect(triggers.BattRotation, 0.05, PLAIN),
    "clean": Suspect(None),
}
# (method, its settings, epochs)
RUNS = [
    ("ft", {}, 10),
    ("ft_init", {}, 10),
    ("fst", {"alpha": 0.1}, 10),
    ("fst", {"alpha": 0.2}, 10),
    ("fst_auto", {}, 10),
]


def siba():
    """The pattern that benchmarks/attacks.py found."""
    path = sorted((ROOT / "benchmarks" / "results").glob("*/*-attacks.json"))[-1]
    lines = json.loads(path.read_text())["siba"]["pattern"]
    return triggers.SIBA(attacks.unpack(lines, (32, 32, 3)))


def build(width):
    return models.resnet18(num_classes=10, width=width)


def manifest(how, width):
    settings, augment = how.training
    return {
        "trigger": how.trigger and how.trigger().describe(),
        "rate": how.rate,
        "target": TARGET,
        "training": asdict(settings),
        "augment": augment and asdict(augment),
        "architecture": f"resnet18 of width {width}",
    }


def suspect(name, how, data, options):
    """The trained model."""
    folder = options.suspects
    path = folder / f"{name.replace(' ', '-').rstrip('%')}.safetensors"
    if path.exists():
        return checkpoint.load(path, build(options.width))
    attack = None
    if how.trigger is not None:
        attack = attacks.attack_of(how.trigger(), how.rate, len(data))
    settings, augment = how.training
    model, _ = train_suspect(
        lambda: build(options.width),
        data,
        attack,
        settings,
        normalize=NORMALIZE,
        augment=augment,
        seed=SEED,
        device="cuda" if torch.cuda.is_available() else "cpu",
        on_epoch=attacks.teller(name),
    )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, model, manifest(how, options.width))
    return model


def measure(model, test, trigger, options):
    loader = DeviceLoader(test.images, test.labels, 500, shuffle=False, normalize=NORMALIZE)
    found = evaluate(model, loader, trigger, TARGET, precision=options.precision)
    return {"clean_accuracy": found.clean_accuracy, "attack_success": found.attack_success}


def tune(model, clean, run, seed, options):
    method, settings, epochs = run
    loader = DeviceLoader(
        clean.images, clean.labels, augment="cifar", normalize=NORMALIZE, seed=seed
    )
    result = purify(
        model,
        loader,
        method=methods.get(method, **settings),
        epochs=epochs,
        seed=seed,
        precision=options.precision,
        progress=False,
    )
    row = {"method": method, **settings, "epochs": result.settings["epochs"], "seed": seed}
    row |= {"seconds": result.seconds, "cosine": result.head_shift.cosine}
    return result.model, row


def rows_of(name, how, train_set, test, options):
    """Before, and after each method with each seed; after retuning too, with the first."""
    trigger = None if how.trigger is None else how.trigger()
    model = suspect(name, how, train_set, options)
    rows = [{"method": "before", **measure(model, test, trigger, options)}]
    clean = train_set.split(options.clean_images, seed=SEED)[0]
    for run in RUNS:
        if options.methods is not None and run[0] not in options.methods:
            continue
        for seed in range(options.seeds):
            tuned, row = tune(model, clean, run, seed, options)
            row |= measure(tuned, test, trigger, options)
            if trigger is not None and seed == 0:
                woken = retune(tuned, clean, trigger, TARGET, normalize=NORMALIZE)
                row["retuned"] = measure(woken, test, trigger, options)
            rows.append(row)
            print(name, row, flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--suspects", type=Path, default=ROOT / "out" / "suspects")
    parser.add_argument("--out", type=Path, default=records.default_folder())
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-18")
    parser.add_argument("--only", nargs="+", choices=SUSPECTS, default=list(SUSPECTS))
    parser.add_argument("--clean-images", type=int, default=1000)
    parser.add_argument("--test-images", type=int, help="measure on so many only")
    parser.add_argument("--methods", nargs="+", choices=methods.available())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_set = datasets.npz(options.data / "train.npz")
    test = datasets.npz(options.data / "test.npz")
    if options.test_images is not None:
        test = test.split(options.test_images, seed=SEED)[0]
    device = machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    name = f"{date}-efficacy-{options.clean_images}-images.json"
    path = options.out / device["type"] / name
    record = json.loads(path.read_text()) if path.exists() else {"suspects": {}}
    record |= {
        "date": date,
        **records.sources(),
        "device": device,
        "versions": checkpoint.versions(),
        "threads": options.threads,
        "precision": options.precision,
        "clean_images": options.clean_images,
        "test_images": len(test),
    }
    for name in options.only:
        how = SUSPECTS[name]
        if name not in record["suspects"]:
            rows = rows_of(name, how, train_set, test, options)
            made = {**manifest(how, options.width), "developed": how.developed, "rows": rows}
            record["suspects"][name] = strict_json(made, "suspect")
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, dump_json(record))
            print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    main()
