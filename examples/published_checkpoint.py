"""Purify a checkpoint as attack benchmarks publish it: weights among other facts, in one .pt file.

    python examples/published_checkpoint.py [--short] [FILE]

Without FILE the script makes one itself, in the layout of BackdoorBench's attack_result.pt.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import suspect
import torch

import fst_fast


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="for lab.models.resnet8, width 8")
    parser.add_argument("--short", action="store_true", help="one epoch of everything")
    options = parser.parse_args()

    model, clean, test, normalize = suspect.make(options.short)
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or Path(folder) / "attack_result.pt"
        if options.file is None:
            facts = {"model_name": "resnet8", "num_classes": 10, "rate": np.float64(0.1)}
            torch.save({**facts, "model": model.state_dict()}, file)

        # The file is read in a process of its own; nothing in it is executed.
        loaded = fst_fast.load(file, arch="fst_fast.lab.models:resnet8", num_classes=10, width=8)
        # A number is FST as published; without alpha the default searches triggers as well.
        settings = {"alpha": 0.07, "epochs": 1 if options.short else 30, "check": not options.short}
        result = fst_fast.purify(loaded, suspect.loader_of(clean, normalize), **settings)
        result.save(Path(folder) / "purified.safetensors")

    measured = suspect.loader_of(test, normalize, shuffle=False)
    for name, network in (("before", loaded), ("after", result.model)):
        found = fst_fast.evaluate(network, measured, suspect.TRIGGER, suspect.TARGET)
        print(f"{name}: {found}")


if __name__ == "__main__":
    main()
