"""Small suspects, images and a configuration, shared by the tests of sweeps."""

import csv
import io

import numpy as np
import torch
from PIL import Image
from ruamel.yaml import YAML

from fst_fast.lab.models import resnet8

ARCH = "fst_fast.lab.models:resnet8"


def write_images(path, count, classes=3):
    """An .npz of noisy images whose brightest channel is their class."""
    generator = torch.Generator().manual_seed(count)
    encoded = []
    for i in range(count):
        image = torch.randint(0, 90, (12, 12, 3), dtype=torch.uint8, generator=generator)
        image[..., i % classes] += 120
        buffer = io.BytesIO()
        Image.fromarray(image.numpy()).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    np.savez(
        path,
        encoded=np.frombuffer(b"".join(encoded), np.uint8),
        offsets=np.cumsum([0, *map(len, encoded)]),
        labels=np.arange(count) % classes,
        classes=np.array(["red", "green", "blue"][:classes]),
    )


def write_parts(folder, train, test):
    """A folder with so many training and test images; returns it."""
    write_images(folder / "train.npz", train)
    write_images(folder / "test.npz", test)
    return folder


def write_sweep(folder, checkpoints=2, **changes):
    """Suspects, images and ``sweep.yaml`` in the folder; returns the path of the last.

    A change of None leaves the key out.
    """
    folder.mkdir(exist_ok=True)
    write_images(folder / "clean.npz", 24)
    write_images(folder / "test.npz", 18)
    entries = []
    for i in range(checkpoints):
        torch.manual_seed(i)
        torch.save(resnet8(num_classes=3, width=8).state_dict(), folder / f"s{i}.pt")
        # Every other attack is known.
        known = {"trigger": "badnets", "trigger_options": {"size": 2}, "target": 1}
        entries.append({"path": f"s{i}.pt", **(known if i % 2 else {})})
    config = {
        "out": "out",
        "checkpoints": entries,
        "arch": ARCH,
        "arch_options": {"width": 8},
        "num_classes": 3,
        "data": "clean.npz",
        "test": "test.npz",
        "normalize": "none",
        "batch_size": 8,
        "methods": ["ft", "fst"],
        "alphas": [0.1],
        "epochs": 2,
        "device": "cpu",
        "threads": 1,
        # The suspects were never trained.
        "force": True,
    }
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    path = folder / "sweep.yaml"
    write_yaml(path, config)
    return path


def write_yaml(path, content):
    YAML(typ="safe", pure=True).dump(content, path)


def read_yaml(path):
    return YAML(typ="safe", pure=True).load(path)


def table(out):
    """The rows of a sweep's results but for the seconds, in which two sweeps may differ."""
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return rows
