"""The suspect and the images, as several commands take them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch import nn

from .. import checkpoints
from ..data import class_names, image_sets, normalization
from ..data.device_loader import DeviceLoader
from ..tuning.arguments import to_float32


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help=".safetensors, .pt/.pth state dict, or a folder of shards"
    )
    parser.add_argument(
        "--arch", required=True, help="torchvision or timm name, or module:callable of your own"
    )
    parser.add_argument(
        "--arch-option", action="append", default=[], metavar="NAME=VALUE", help="JSON value"
    )
    parser.add_argument("--num-classes", type=int, help="default: taken from the checkpoint")
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with one sub-folder for each of the model's classes (sorted names are labels "
        "0, 1, ..., and numbers are the labels themselves), or .npz",
    )
    known = ", ".join(normalization.NORMALIZATIONS)
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the model's classes by name: one a line, or JSON; --data may then lack some",
    )
    parser.add_argument("--size", type=int, help="resize and centre-crop to this many pixels")
    parser.add_argument(
        "--normalize",
        required=True,
        metavar="NAME|MEANS/STDS",
        help=f"as in training: {known}, or like 0.5,0.5,0.5/0.2,0.2,0.2",
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--skip-corrupt", action="store_true", help="leave out images that cannot be read"
    )


def load_model(options: argparse.Namespace) -> tuple[nn.Module, dict[str, object]]:
    """The model, and what the manifest says of where it came from."""
    settings = normalization.options(options.arch_option)
    model = checkpoints.load(options.checkpoint, options.arch, options.num_classes, **settings)
    note = to_float32(model)
    if note is not None:
        print(f"note: {options.checkpoint}: {note}", file=sys.stderr)
    facts: dict[str, object] = {
        "parent": {
            "path": str(options.checkpoint),
            "sha256": checkpoints.digest(options.checkpoint),
        },
        "arch": {"name": options.arch, "num_classes": options.num_classes, **settings},
    }
    return model, facts


def load_images(
    options: argparse.Namespace, path: Path, model: nn.Module, where: str = "--data"
) -> image_sets.ImageSet:
    """The images, under the model's labels; refused where these are not certain."""
    names = None if options.classes is None else class_names.read_names(options.classes)
    normalize = normalization.normalization(options.normalize)
    images = image_sets.read(path, options.size, skip_corrupt=options.skip_corrupt)
    labelled = path.suffix == ".npz"
    return class_names.fit_model(images, model, normalize, names, labelled=labelled, where=where)


def loader(options: argparse.Namespace, images: image_sets.ImageSet, shuffle: bool) -> DeviceLoader:
    augment = getattr(options, "augment", "none") if shuffle else "none"
    return DeviceLoader(
        images.images,
        images.labels,
        options.batch_size,
        shuffle=shuffle,
        seed=getattr(options, "seed", 0),
        augment=None if augment == "none" else augment,
        normalize=normalization.normalization(options.normalize),
    )
