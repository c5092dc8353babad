"""Measure what a step of each method takes, against the passes that its ``cost`` tells.

    python benchmarks/passes.py [--methods ft ft_sam ...] [--record FILE.json]

A pass is the lab's ResNet-18 of width 8 forward and backward, with its loss, on the same batches of
32 x 32 images. A step's time is that of an epoch, but the first and the last, by its steps;
searches beside the steps are left out. Times are CPU seconds of the process on one thread, so that
others on the machine count little. A pass is timed just before and after each epoch, and the ratio
is the median over the epochs of step / (passes x pass). A row is written as soon as it is there,
and rows that are there are not measured again.
"""

import argparse
import datetime
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import fst_fast
from fst_fast import methods
from fst_fast.bench import machine, records
from fst_fast.checkpoints.atomic_files import dump_json, replace_file
from fst_fast.lab.models import resnet18

WIDTH, STEPS, ALLOWED = 8, 4, 1.2
# These switch off what a method does beside its steps.
ALONE = {
    "anp": {"most_lost": 0.0},
    "bti_dbf": {"mask_steps": 0, "invert_steps": 0},
    "i_bau": {"search_steps": 0},
    "rnp": {"passes": 0, "most_lost": 0.0},
    "ssft": {"shortcut": 2},
    "tsbd": {"passes": 0, "most_lost": 0.0},
}
# A step of these makes no pass of the model, or its searches belong to every epoch.
APART = ("bna", "clp", "lp", "trigger_unlearning")
RESULTS = Path(__file__).parent / "results" / "cpu"


def batches_of(size):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 10)
        for _ in range(STEPS)
    ]


def model_of():
    torch.manual_seed(0)
    return resnet18(num_classes=10, width=WIDTH)


def pass_seconds(model, batches):
    """The CPU seconds of one pass, as the mean over the batches."""
    started = time.process_time()
    for images, labels in batches:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
    return (time.process_time() - started) / len(batches)


def measured(name, batches, epochs):
    """The row of a method."""
    bare = model_of().train().to(memory_format=torch.channels_last)
    placed = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    pass_seconds(bare, placed)
    method = methods.get(name, **ALONE.get(name, {}))
    steps, passes = [], []
    last = None

    def look(record, model):
        nonlocal last
        now = time.process_time()
        if last is not None:
            steps.append((now - last) / len(batches))
        passes.append(pass_seconds(bare, placed))
        last = time.process_time()

    fst_fast.purify(
        model_of(),
        batches,
        method=method,
        epochs=epochs + 2,
        alpha=None,
        device="cpu",
        precision="fp32",
        channels_last=True,
        threads=1,
        progress=False,
        callbacks=[look],
        check=False,
    )
    # The last epoch ends with what the method does at the end of its run.
    del steps[-1], passes[-1]
    beside = [(one + other) / 2 for one, other in itertools.pairwise(passes)]
    told = method.passes_per_image()
    # The first quarter of fst_auto's epochs trains the head alone, and is no step like the others.
    kept = slice(len(steps) // 4 + 1, None) if name == "fst_auto" else slice(None)
    relative = [s / p for s, p in zip(steps[kept], beside[kept], strict=True)]
    taken = statistics.median(relative)
    return {
        "method": name,
        "settings": {k: v for k, v in method.settings().items() if k != "method"},
        "step_ms": 1000 * statistics.median(steps[kept]),
        "pass_ms": 1000 * statistics.median(passes),
        "passes_measured": taken,
        "passes_told": told,
        "ratio": taken / told,
        "within": taken / told <= ALLOWED,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = [name for name in methods.METHODS if name not in APART]
    parser.add_argument("--methods", nargs="+", choices=known, metavar="NAME", default=known)
    parser.add_argument("--epochs", type=int, default=3, help="that are timed")
    parser.add_argument("--batch-size", type=int, default=64)
    date = datetime.date.today().isoformat()
    parser.add_argument("--record", type=Path, default=RESULTS / f"{date}-passes.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = {
        "suite": "passes",
        "date": date,
        **records.sources(),
        "device": machine.describe(torch.device("cpu")),
        "versions": machine.versions(),
        "protocol": {
            "network": f"resnet18:{WIDTH}",
            "batch_size": options.batch_size,
            "steps": STEPS,
            "epochs": options.epochs,
            "allowed": ALLOWED,
        },
        "rows": [],
    }
    if options.record.exists():
        kept = json.loads(options.record.read_text())
        if kept["protocol"] != record["protocol"]:
            raise SystemExit(f"--record: {options.record} is of another protocol; name another")
        record = kept
    batches = batches_of(options.batch_size)
    done = [row["method"] for row in record["rows"]]
    for name in options.methods:
        if name not in done:
            record["rows"].append(measured(name, batches, options.epochs))
            replace_file(options.record, dump_json(records.finish(record)))
    for row in record["rows"]:
        told = f"{row['passes_measured']:.2f} passes measured, {row['passes_told']:g} told"
        print(f"{row['method']:20} {told}, ratio {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
