"""How well SIBA and BATT's rotation backdoor CIFAR-10 models: poisons, trains, writes a record.

python benchmarks/attacks.py --data FOLDER    (with train.npz and test.npz; see fst_fast.lab.npz)

The record is written after every model. Started again with the same settings, the script goes on
with it and trains only what it lacks; SIBA's pattern is taken from there as well.
"""

import argparse
import datetime
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from fst_fast import DeviceLoader, checkpoint, evaluate
from fst_fast.bench import machine, records
from fst_fast.files import dump_json, replace_file, strict_json
from fst_fast.lab import datasets, models
from fst_fast.lab.siba import find_siba
from fst_fast.lab.suspect import Attack, train_suspect
from fst_fast.lab.train import TrainSettings
from fst_fast.triggers import SIBA, BattRotation

NORMALIZE = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
WIDTH = 16
BATCH = 128
TARGET = 0
SEED = 0
# Neither crop nor flip: BATT's own recipe, and what moves a pattern of few pixels hides it.
AUGMENT = None
ATTACKS = ("siba", "batt")
RATES = (0.01, 0.05)
# Of SIBA's search: the paper's bounds, on fewer images and for fewer epochs.
SEARCH = {"k": 100, "epsilon": 8, "epochs": 60, "batch_size": 500, "seed": 2, "precision": "bf16"}
SEARCH_IMAGES = 4_000


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    if options.models is not None:
        options.models.mkdir(parents=True, exist_ok=True)
    train_set = datasets.npz(options.data / "train.npz")
    if options.images is not None:
        train_set = train_set.split(options.images, seed=SEED)[0]
    test = datasets.npz(options.data / "test.npz")
    path, record = open_record(options, len(train_set))
    for name in options.attacks:
        trigger = None
        for rate in options.rates:
            if any(row["attack"] == name and row["rate"] == rate for row in record["rows"]):
                print(f"{name} {rate:.0%}: in {path.name} already")
                continue
            trigger = trigger or make_trigger(name, record, path, train_set, test, options)
            row = attack(name, trigger, rate, train_set, test, options)
            record["rows"].append(row)
            write(record, path)
            print(
                f"{name} {rate:.0%}: attack success {row['attack_success']:.2%}, clean accuracy "
                f"{row['clean_accuracy']:.2%}; wrote {path.name}",
                flush=True,
            )


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=ATTACKS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="poisoned share")
    parser.add_argument("--epochs", type=int, default=15, help="of the backdoored models")
    parser.add_argument("--surrogate-epochs", type=int, default=12, help="of SIBA's surrogate")
    parser.add_argument("--images", type=int, help="train on so many only, for a quick look")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", type=Path, help="folder to keep the models in")
    parser.add_argument("--out", type=Path, default=records.default_folder())
    return parser.parse_args()


def settings_of(options, images):
    """What decides the result, apart from the code; a record holds rows of one such."""
    return {
        "architecture": f"resnet18 of width {WIDTH}",
        "images": images,
        "target": TARGET,
        "seed": SEED,
        "batch_size": BATCH,
        "training": asdict(training(options.epochs, options)),
        "augment": AUGMENT,
        "surrogate": {"training": asdict(training(options.surrogate_epochs, options))},
        "search": {"images": min(SEARCH_IMAGES, images), **SEARCH},
    }


def training(epochs, options):
    return TrainSettings(epochs=epochs, lr=0.1, precision=options.precision)


def open_record(options, images):
    """The path of the record, and the record itself: one with these settings, or an empty one."""
    device = machine.describe(torch.device(options.device))
    folder = options.out / device["type"]
    settings = strict_json(settings_of(options, images), "settings")
    for path in sorted(folder.glob("*-attacks.json"), reverse=True):
        record = json.loads(path.read_text())
        if record["settings"] == settings and record["device"]["name"] == device["name"]:
            print(f"going on with {path.name}")
            return path, record
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path = folder / f"{date}-attacks.json"
    if path.exists():
        raise SystemExit(f"attacks: {path} has other settings; move it away or give another --out")
    record = {
        "suite": "attacks",
        "date": date,
        "device": device,
        "versions": machine.versions(),
        "settings": settings,
        "siba": None,
        "rows": [],
    }
    return path, record


def write(record, path):
    """All or nothing: the models in it took long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, dump_json(strict_json(record, "record")))


def make_trigger(name, record, path, train_set, test, options):
    if name == "batt":
        return BattRotation()
    if record["siba"] is None:
        record["siba"] = search(train_set, test, options)
        write(record, path)
    return SIBA(unpack(record["siba"]["pattern"], train_set.images.shape[1:]))


def search(train_set, test, options):
    """Train the surrogate on clean images, and find the pattern on it."""
    settings = training(options.surrogate_epochs, options)
    model, seconds = fit(train_set, None, settings, "surrogate", options)
    images = train_set.split(min(SEARCH_IMAGES, len(train_set)), seed=SEED)[0].images
    started = time.perf_counter()
    found = find_siba(
        model,
        images,
        target=TARGET,
        normalize=NORMALIZE,
        device=options.device,
        on_epoch=teller("pattern"),
        **SEARCH,
    )
    metrics = measure(model, test, SIBA(found.pattern), options)
    print(f"pattern: loss {found.loss:.3f}; on the surrogate {metrics}", flush=True)
    return {
        "surrogate": {"training_seconds": seconds, **metrics},
        "search_seconds": time.perf_counter() - started,
        "loss": found.loss,
        "history": found.history,
        "pattern": pack(found.pattern),
        "threads": options.threads,
        **records.sources(),
    }


def attack(name, trigger, rate, train_set, test, options):
    """Poison the stored bytes, train on them, measure: a row of the record."""
    settings = training(options.epochs, options)
    made = attack_of(trigger, rate, len(train_set))
    model, seconds = fit(train_set, made, settings, f"{name} {rate:.0%}", options)
    return {
        "attack": name,
        "rate": rate,
        "trigger": trigger.describe(),
        "poisoned_images": round(rate * len(train_set)),
        "cover_images": round(made.cover * len(train_set)),
        "training_seconds": seconds,
        **measure(model, test, trigger, options),
        "threads": options.threads,
        **records.sources(),
    }


def attack_of(trigger, rate, count):
    """All-to-one; BATT turns every image that is not poisoned by some other angle."""
    cover = 1 - round(rate * count) / count if trigger.covers() else 0.0
    return Attack(trigger, rate, TARGET, cover)


def fit(data, made, settings, name, options):
    """A model trained on these, and the seconds that took."""
    model, seconds = train_suspect(
        lambda: models.resnet18(num_classes=10, width=WIDTH),
        data,
        made,
        settings,
        normalize=NORMALIZE,
        augment=AUGMENT,
        batch_size=BATCH,
        seed=SEED,
        device=options.device,
        on_epoch=teller(name),
    )
    if options.models is not None:
        path = options.models / f"{name.replace(' ', '-').rstrip('%')}.safetensors"
        checkpoint.save(path, model, {"training": asdict(settings)})
    return model, seconds


def measure(model, test, trigger, options):
    loader = DeviceLoader(test.images, test.labels, 500, shuffle=False, normalize=NORMALIZE)
    return asdict(evaluate(model, loader, trigger, TARGET, device=options.device))


def teller(name):
    def tell(epoch, loss, seconds):
        print(f"{name}: epoch {epoch} loss {loss:.3f} {seconds:.0f} s", flush=True)

    return tell


def pack(pattern):
    """[H, W, C] as text, one line a pixel that changes: row, column, change of each channel."""
    rows, columns = (pattern != 0).any(-1).nonzero(as_tuple=True)
    return [
        " ".join(map(str, (row, column, *pattern[row, column].tolist())))
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
    ]


def unpack(lines, shape):
    pattern = torch.zeros(shape, dtype=torch.int16)
    for line in lines:
        row, column, *change = map(int, line.split())
        pattern[row, column] = torch.tensor(change, dtype=torch.int16)
    return pattern


if __name__ == "__main__":
    main()
