"""What each method does to backdoored CIFAR-10 models: trains them, tunes them, writes a record.

python benchmarks/efficacy.py --data FOLDER    (with train.npz and test.npz; see fst_fast.lab.npz)

A trained suspect model is kept in --suspects and taken from there the next time.
"""

import argparse
import datetime
import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from fst_fast import Augment, DeviceLoader, checkpoint, evaluate, methods, purify, triggers
from fst_fast.lab import datasets, models
from fst_fast.lab.suspect import Attack, train_suspect
from fst_fast.lab.train import TrainSettings

ROOT = Path(__file__).parents[1]
NORMALIZE = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
TRIGGERS = {"badnets": triggers.BadNets(margin=2), "blended": triggers.Blended(alpha=0.2)}
WIDTH = 16
SETTINGS = TrainSettings(epochs=10, lr=0.1, precision="bf16")
AUGMENT = Augment(pad=2)
CLEAN_IMAGES = 1000
# (method, its settings, epochs)
RUNS = [
    ("ft", {}, 10),
    ("ft_init", {}, 10),
    ("fst", {"alpha": 0.1}, 10),
    ("fst", {"alpha": 0.2}, 10),
    ("fst", {"alpha": 0.1}, 40),
    ("fst", {"alpha": 0.2}, 40),
]


def build():
    return models.resnet18(num_classes=10, width=WIDTH)


def suspect(name, rate, data, folder):
    """The trained model, and the manifest that says how it was made."""
    path = folder / f"{name}-{rate}.safetensors"
    if not path.exists():
        attack = Attack(TRIGGERS[name], rate)
        model, seconds = train_suspect(
            build,
            data,
            attack,
            SETTINGS,
            normalize=NORMALIZE,
            augment=AUGMENT,
            on_epoch=lambda epoch, loss, s: print(
                f"{name}: epoch {epoch} loss {loss:.3f} {s:.0f} s"
            ),
        )
        folder.mkdir(parents=True, exist_ok=True)
        made = {
            "trigger": attack.trigger.describe(),
            "rate": rate,
            "target": attack.target,
            "training": asdict(SETTINGS),
            "augment": asdict(AUGMENT),
            "architecture": f"resnet18 of width {WIDTH}",
            "seconds": seconds,
        }
        checkpoint.save(path, model, made)
    return checkpoint.load(path, build()), json.loads(path.with_suffix(".json").read_text())


def measure(model, test, trigger):
    loader = DeviceLoader(test.images, test.labels, 500, shuffle=False, normalize=NORMALIZE)
    return asdict(evaluate(model, loader, trigger))


def tune(model, clean, method, settings, epochs):
    loader = DeviceLoader(clean.images, clean.labels, augment="cifar", normalize=NORMALIZE)
    chosen = methods.get(method, **settings)
    result = purify(model, loader, method=chosen, epochs=epochs, progress=False)
    row = {
        "method": method,
        **settings,
        "epochs": epochs,
        "seconds": result.seconds,
        "cosine": result.head_shift.cosine,
        "stopped": result.stopped,
        "precision": result.settings["precision"],
    }
    return result.model, row


def git(*arguments):
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--suspects", type=Path, default=ROOT / "out" / "suspects")
    parser.add_argument("--attacks", nargs="+", choices=sorted(TRIGGERS), default=sorted(TRIGGERS))
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_set = datasets.npz(options.data / "train.npz")
    test = datasets.npz(options.data / "test.npz")
    clean = train_set.split(CLEAN_IMAGES, seed=0)[0]
    for name in options.attacks:
        model, made = suspect(name, options.rate, train_set, options.suspects)
        rows = [{"method": "before", **measure(model, test, TRIGGERS[name])}]
        print(name, rows[0], flush=True)
        for method, settings, epochs in RUNS:
            tuned, row = tune(model, clean, method, settings, epochs)
            rows.append({**row, **measure(tuned, test, TRIGGERS[name])})
            print(name, rows[-1], flush=True)
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        record = {
            "date": date,
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
            "versions": checkpoint.versions(),
            "threads": options.threads,
            "clean_images": CLEAN_IMAGES,
            "suspect": {k: v for k, v in made.items() if k not in ("payload", "versions")},
            "rows": rows,
        }
        device = "cuda" if torch.cuda.is_available() else "cpu"
        path = (
            ROOT / "benchmarks" / "results" / device / f"{date}-efficacy-{name}-{options.rate}.json"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
