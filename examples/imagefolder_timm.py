"""Purify a timm model on a folder of images, at 224 pixels.

    python examples/imagefolder_timm.py [--short] [--data FOLDER --checkpoint FILE --arch NAME]

FOLDER has one sub-folder for each class. Without it the script writes digits as PNG files, and
tunes a model that it makes: method "ft" is plain fine-tuning.
"""

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from torchvision import datasets, transforms

import fst_fast
from fst_fast.data.image_sets import digits


def write_digits(folder, count):
    data = digits(64).split(count)[0]
    for number, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(folder / str(label) / f"{number}.png")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--arch", default="mobilenetv3_small_050")
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            write_digits(Path(folder), 20 if options.short else 200)
        steps = [transforms.Resize((224, 224)), transforms.ToTensor()]
        steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        images = datasets.ImageFolder(options.data or folder, transforms.Compose(steps))
        loader = torch.utils.data.DataLoader(images, 10 if options.short else 32, shuffle=True)
        if options.checkpoint is not None:
            model = fst_fast.load(options.checkpoint, options.arch, len(images.classes))
        else:
            model = timm.create_model(options.arch, num_classes=len(images.classes))
            first = {"method": "ft", "epochs": 1 if options.short else 8, "check": False}
            model = fst_fast.purify(model, loader, **first).model
        # A number is FST as published; without alpha the default searches triggers as well.
        settings = {"alpha": 0.02, "epochs": 1 if options.short else 3, "check": not options.short}
        result = fst_fast.purify(model, loader, **settings)
        print(f"clean accuracy {result.before:.1%} before, {result.after:.1%} after")


if __name__ == "__main__":
    main()
