"""Broken images and label sets: each is read, or refused by an error that names its file."""

import random
import re
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fst_fast.data import image_sets
from fst_fast.data.torch_pipeline.lift import lift

from . import pictures
from .records import row

# Nothing here is large: whatever takes longer hangs.
LONGEST_SECONDS = 5.0


def outcome(read, path):
    """ "read", "refused", or what went wrong in reading a data set from this file."""
    start = time.monotonic()
    try:
        made = read()
    except ValueError as error:
        found = "refused" if path.name in str(error) else f"the file is not named: {error}"
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    else:
        found = _fault(made) or "read"
    seconds = time.monotonic() - start
    return found if seconds < LONGEST_SECONDS else f"{seconds:.1f} s"


def _fault(made):
    images, labels, classes = made.images, made.labels, len(made.classes)
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
        return f"images {images.dtype} {list(images.shape)}, labels {list(labels.shape)}"
    if not bool(((labels >= 0) & (labels < classes)).all()):
        return "labels beyond the classes"
    return None


def broken_folders(count, root, read=image_sets.folder):
    """Outcomes of as many folders of one image, each broken at random."""
    files, draw = list(pictures.whole().values()), random.Random(0)
    path = root / "a" / "broken.png"
    path.parent.mkdir()
    for _ in range(count):
        path.write_bytes(pictures.mutated(draw, files))
        yield outcome(lambda: read(root), path)


def broken_loaders(count, root):
    """The same through DeviceLoader's way of taking a DataLoader apart."""
    files, draw = list(pictures.whole().values()), random.Random(1)
    path = root / "b" / "broken.png"
    path.parent.mkdir()

    def read():
        found = lift(DataLoader(ImageFolder(root, transforms.ToTensor())))
        return image_sets.ImageSet(found.images, found.labels, ("b",))

    for _ in range(count):
        path.write_bytes(pictures.mutated(draw, files))
        yield outcome(read, path)


def broken_archives(count, root):
    """Outcomes of .npz sets: half with one array that does not fit, half with broken bytes."""
    files, draw = list(pictures.whole().values()), random.Random(2)
    same = [files[0]] * 6
    path = root / "broken.npz"
    np.savez_compressed(path, **pictures.arrays(same, random.Random(11)))
    archives = [path.read_bytes()]
    np.savez(path, **pictures.arrays(same, random.Random(11)))
    archives.append(path.read_bytes())
    for i in range(count):
        if i % 2:
            path.write_bytes(pictures.mutated(draw, archives))
        else:
            np.savez(path, **pictures.arrays(same, draw))
        yield outcome(lambda: image_sets.npz(path), path)


def refusals(root):
    """Outcomes of the kinds that must be refused; anything else is told."""
    path = root / "c" / "refused.png"
    path.parent.mkdir()
    for name, (data, said) in pictures.refused().items():
        path.write_bytes(data)
        try:
            image_sets.folder(root)
            yield f"{name}: read"
        except ValueError as error:
            right = path.name in str(error) and re.search(said, str(error))
            yield "refused" if right else f"{name}: {error}"


def wrong(outcomes):
    """(how many, those that are neither "read" nor "refused")."""
    outcomes = list(outcomes)
    return len(outcomes), [found for found in outcomes if found not in ("read", "refused")]


def rows(full):
    """Lines for the table of docs/reliability.md."""
    share = 1 if full else 20
    suites = {
        "kinds of images that must be refused": refusals,
        "images broken at random, in folders": lambda root: broken_folders(3000 // share, root),
        "images broken at random, in DataLoaders": lambda root: broken_loaders(500 // share, root),
        "label sets (.npz) broken at random": lambda root: broken_archives(1000 // share, root),
    }
    table = []
    # Pillow warns of damage that it reads over.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for what, make in suites.items():
            with tempfile.TemporaryDirectory() as root:
                count, found = wrong(make(Path(root)))
                for told in found[:5]:
                    print(f"{what}: {told}")
                table.append(row(f"{what}: hangs, other errors, unnamed files", count, len(found)))
    return table
