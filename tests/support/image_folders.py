"""A folder of images on the disk, with one folder for each class, as the command line takes it."""

import torch
from PIL import Image


def write_classes(folder, count, side):
    """Write ``count`` noisy images of each of three classes, which their colour tells apart."""
    for label, name in enumerate(["ant", "bee", "cat"]):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = torch.randint(0, 60, (3, side, side), dtype=torch.uint8)
            image[label] += 150
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name / f"{i}.png")
