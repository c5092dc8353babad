"""Several checkpoints, methods and seeds as one job that can be killed and resumed.

    python examples/sweep.py [--short] [FOLDER]

The same call goes on where it was ended; so does `fst-fast sweep FOLDER/sweep.yaml`.
"""

import sys
import tempfile
from pathlib import Path

import suspect
import torch
from PIL import Image

from fst_fast.cli.main import main as fst_fast_command

CONFIGURATION = """\
out: sweep
checkpoints:
  - {{path: suspect.pt, trigger: badnets, trigger_options: {{size: 3}}, target: 0}}
arch: fst_fast.lab.models:resnet8
arch_options: {{width: 8}}
num_classes: 10
data: clean
test: test
normalize: {normalize}
methods: [ft, fst]
alphas: [0.1]
seeds: {seeds}
epochs: {epochs}
force: {force}
"""


def write_images(images, folder):
    for number, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
        (folder / str(int(label))).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(folder / str(int(label)) / f"{number}.png")


def main(folder, short=False):
    model, clean, test, normalize = suspect.make(short)
    if not (folder / "sweep.yaml").exists():
        torch.save(model.state_dict(), folder / "suspect.pt")
        write_images(clean, folder / "clean")
        write_images(test, folder / "test")
        size = {"seeds": [0], "epochs": 1} if short else {"seeds": [0, 1], "epochs": 10}
        text = CONFIGURATION.format(normalize=list(normalize), force=str(short).lower(), **size)
        (folder / "sweep.yaml").write_text(text)
    return fst_fast_command(["sweep", str(folder / "sweep.yaml"), "--quiet"])


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--short"]
    sys.exit(main(Path(arguments[0] if arguments else tempfile.mkdtemp()), "--short" in sys.argv))
