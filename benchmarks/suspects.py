"""Measure what each method makes of classifiers that others trained.

    python benchmarks/suspects.py FOLDER --data DATA [--methods ft:40 fst:0.2 fst_auto auto]

FOLDER holds suspects.py with ``SUSPECTS``, a mapping by name, and ``load(name)``, which returns
(model, (mean, std), trigger, target). The trigger takes and returns uint8 [N, H, W, C] arrays, or
is one of fst_fast.triggers; it is None for a model that was never backdoored. DATA holds train.npz
and test.npz. A method is NAME or NAME:EPOCHS; fst:NUMBER is FST with that alpha, auto what
alpha="auto" runs. A row is written as soon as it is there, and rows that are there are not made
again. --others takes the rows of other methods over from an older record of the same protocol, each
with its commit and device. --untimed leaves the seconds out, for a machine that is busy otherwise.
"""

import argparse
import datetime
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import fst_fast
from fst_fast.bench import machine, records
from fst_fast.checkpoints.atomic_files import dump_json, replace_file
from fst_fast.data.image_sets import npz
from fst_fast.triggers.base import Trigger

EPOCHS = 10


@dataclass(frozen=True, eq=False)
class Given(Trigger):
    """A trigger as a function of arrays."""

    function: object

    def _apply(self, images):
        changed = self.function(images.cpu().numpy())
        return torch.as_tensor(np.ascontiguousarray(changed)).to(images.device)


def suspects_of(folder):
    path = folder / "suspects.py"
    spec = importlib.util.spec_from_file_location("suspects_given", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def settings_of(method):
    """The arguments of purify for a method on the command line."""
    name, _, number = method.partition(":")
    if name == "auto":
        return {"method": "fst", "alpha": "auto", "epochs": EPOCHS}
    if name == "fst":
        return {"method": "fst", "alpha": float(number), "epochs": EPOCHS}
    return {"method": name, "alpha": None, "epochs": int(number or EPOCHS)}


def loader_of(images, normalize, shuffle, seed=0):
    augment = "cifar" if shuffle else None
    return fst_fast.DeviceLoader(
        images.images,
        images.labels,
        128,
        shuffle=shuffle,
        augment=augment,
        normalize=normalize,
        seed=seed,
    )


def measured(model, test, normalize, trigger, target):
    loader = loader_of(test, normalize, shuffle=False)
    names = ("clean_accuracy", "attack_success", "robust_accuracy")
    if trigger is None:
        found = fst_fast.evaluate(model, loader)
        return {name: getattr(found, name) for name in names}
    given = trigger if isinstance(trigger, Trigger) else Given(trigger)
    shown = {"trigger": given, "nothing": Given(lambda images: images)}
    found = fst_fast.evaluate(model, loader, shown, target)
    row = {name: getattr(found["trigger"], name) for name in names}
    # So many images of other classes are taken for the target without any trigger.
    return {**row, "clean_as_target": found["nothing"].attack_success}


def rows_of(options, module, clean, test):
    """Each row that is still to be made, as (its facts, a function that makes it)."""
    for name in options.suspects or module.SUSPECTS:
        yield (
            {"suspect": name, "method": "none", "seed": None},
            lambda name=name: measured(*_loaded(module, name, test)),
        )
        for method in options.methods:
            for seed in range(options.seeds):
                facts = {"suspect": name, "method": method, "seed": seed}
                yield facts, lambda f=facts: purified(f, module, clean, test, options)


def taken_over(older, record, methods):
    """Rows of an older record whose methods are not measured anew."""
    if older["protocol"] != record["protocol"]:
        raise SystemExit(f"--others: must be of the protocol {record['protocol']}")
    origin = {"commit": older["commit"], "device": older["device"]}
    return [{**origin, **row} for row in older["rows"] if row["method"] not in (*methods, "none")]


def _loaded(module, name, test):
    model, normalize, trigger, target = module.load(name)
    return model, test, normalize, trigger, target


def purified(facts, module, clean, test, options):
    model, normalize, trigger, target = module.load(facts["suspect"])
    try:
        result = fst_fast.purify(
            model,
            loader_of(clean, normalize, shuffle=True, seed=facts["seed"]),
            seed=facts["seed"],
            precision=options.precision,
            threads=options.threads,
            progress=False,
            **settings_of(facts["method"]),
        )
    except ValueError as error:
        # A method says what it needs of a model before it changes anything.
        return {"refused": str(error).split("\n")[0]}
    row = {"epochs": len(result.history), "stopped": result.stopped}
    if not options.untimed:
        row["seconds"] = result.seconds
    return {**measured(result.model, test, normalize, trigger, target), **row}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--suspects", nargs="+")
    parser.add_argument("--methods", nargs="+", default=["ft:40", "fst:0.2", "fst_auto", "auto"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--clean-images", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--precision", default="fp32" if not torch.cuda.is_available() else "auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--record", type=Path, required=True, help="FILE.json, added to")
    parser.add_argument("--untimed", action="store_true", help="leave the seconds out")
    parser.add_argument("--others", type=Path, help="an older record with rows of other methods")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    module = suspects_of(options.folder)
    train, test = (npz(options.data / f"{split}.npz") for split in ("train", "test"))
    clean = train.split(options.clean_images, seed=0)[0]
    test = test.subset(torch.arange(min(options.test_images, len(test))))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "suite": "suspects",
        "date": datetime.date.today().isoformat(),
        **records.sources(),
        "device": machine.describe(device),
        "versions": machine.versions(),
        "protocol": {
            "clean_images": options.clean_images,
            "test_images": len(test),
            "batch_size": 128,
            "augment": "cifar",
            "precision": options.precision,
        },
        "rows": [],
    }
    if options.record.exists():
        record = json.loads(options.record.read_text())
    elif options.others:
        older = json.loads(options.others.read_text())
        record["rows"] = taken_over(older, record, options.methods)
    done = [{key: row[key] for key in ("suspect", "method", "seed")} for row in record["rows"]]
    for facts, make in rows_of(options, module, clean, test):
        if facts in done:
            continue
        record["rows"].append({**facts, **make()})
        replace_file(options.record, dump_json(records.finish(record)))
        print(record["rows"][-1], flush=True)


if __name__ == "__main__":
    main()
