"""Make backdoored suspects of a clean classifier, by tuning it on poisoned images.

    python benchmarks/tuned_suspects.py OUT --folder FOLDER --clean resnet20_clean --data DATA \\
        --attacks blended:0.05 wanet:0.1

FOLDER and DATA are those of benchmarks/suspects.py. The images that suspects.py purifies with are
not among those that a suspect is made of. OUT gets a file of weights for each attack, the facts of
all in suspects.json, and a suspects.py, so that it is a folder for benchmarks/suspects.py itself.
What is there is not made again.
"""

import argparse
import json
import sys
from pathlib import Path

import safetensors.torch
import torch
from suspects import measured, suspects_of

import fst_fast
from fst_fast import lab, triggers
from fst_fast.checkpoints.atomic_files import dump_json, replace_file
from fst_fast.data.image_sets import npz
from fst_fast.lab.attacks import REST, attack_of, recipe_of
from fst_fast.lab.train import TrainSettings
from fst_fast.lab.train import train as tune

PAD, BATCH = 2, 128
SHIM = """from tuned_suspects import opened

SUSPECTS, load = opened(__file__)
"""


def opened(file):
    """Return the suspects of a folder, and a function that loads one."""
    folder = Path(file).parent
    facts = json.loads((folder / "suspects.json").read_text())

    def load(name):
        entry = facts[name]
        base = suspects_of(Path(entry["folder"]))
        model, normalize, _, _ = base.load(entry["clean"])
        model.load_state_dict(safetensors.torch.load_file(folder / f"{name}.safetensors"))
        trigger = triggers.get(entry["trigger"], **entry["settings"])
        return model, normalize, trigger, entry["target"]

    return facts, load


def made(attack, rate, options, train, test):
    """Tune the clean model on poisoned images; return it and what is to be noted of it."""
    recipe = recipe_of(attack)
    if recipe.needs:
        raise SystemExit(f"--attacks: {attack} needs a surrogate; see fst-fast lab")
    model, normalize, _, _ = suspects_of(options.folder).load(options.clean)
    trigger = lab.trigger_of(attack)
    plan = attack_of(attack, trigger, rate, len(train), target=options.target)
    poisoned = plan.on(train, seed=0)
    loader = fst_fast.DeviceLoader(
        poisoned.images,
        poisoned.labels,
        BATCH,
        augment=fst_fast.Augment(pad=PAD, flip=True) if recipe.crops else None,
        normalize=normalize,
        drop_last=True,
        seed=0,
    )
    torch.manual_seed(0)
    settings = TrainSettings(epochs=options.epochs, lr=options.lr, momentum=0.9)
    seconds = tune(model, loader, settings)
    facts = {
        "folder": str(options.folder.resolve()),
        "clean": options.clean,
        "attack": attack,
        "rate": rate,
        "covered": "all others" if recipe.cover == REST else recipe.cover * rate,
        "relabel": recipe.relabel,
        "trigger": recipe.trigger,
        "settings": dict(recipe.settings),
        "target": options.target,
        "images": len(train),
        "epochs": options.epochs,
        "seconds": seconds,
        **measured(model, test, normalize, trigger, options.target),
    }
    return model, facts


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--clean", required=True, help="name of the clean suspect")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--attacks", nargs="+", required=True, help="NAME:RATE")
    parser.add_argument("--target", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--clean-images", type=int, default=1000, help="kept for purifying")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    listed = options.out / "suspects.json"
    facts = json.loads(listed.read_text()) if listed.exists() else {}
    (options.out / "suspects.py").write_text(SHIM)
    train, test = (npz(options.data / f"{split}.npz") for split in ("train", "test"))
    train = train.split(options.clean_images, seed=0)[1]
    train = train.split(min(options.images, len(train)), seed=1)[0]
    test = test.subset(torch.arange(min(2000, len(test))))
    for order in options.attacks:
        attack, _, rate = order.partition(":")
        name = f"{options.clean.partition('_')[0]}_{attack}_{100 * float(rate):g}".replace("-", "_")
        if name in facts:
            continue
        model, facts[name] = made(attack, float(rate), options, train, test)
        weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        safetensors.torch.save_file(weights, options.out / f"{name}.safetensors")
        replace_file(listed, dump_json(facts))
        print(name, facts[name], flush=True)


if __name__ == "__main__":
    sys.exit(main())
