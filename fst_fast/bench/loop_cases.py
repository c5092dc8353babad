"""Cases of the suites ``loop`` and ``evaluate``: a network and images whose colour tells."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from fst_fast.data.augment import Augment
from fst_fast.data.device_loader import DeviceLoader
from fst_fast.data.image_sets import ImageSet
from fst_fast.lab.models import resnet18

from . import flops, plain

NORMALIZE = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CLASSES, BATCH = 10, 128
Around = Callable[[Any], Any]


@dataclass(frozen=True)
class LoopCase:
    """Tuning, or evaluating clean and triggered, a network on so many images."""

    op: str
    width: int
    images: int
    epochs: int = 1
    dtype: ClassVar[str] = "fp32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.width, self.images, self.epochs

    @property
    def flops(self) -> int:
        """The operations of all steps, or of the clean and the triggered pass."""
        image = _flops(self.width)
        if self.op == "loop":
            return image.training * self.images * self.epochs
        return 2 * image.forward * self.images

    def __str__(self) -> str:
        return f"{self.op}: width {self.width}, {self.images} images, {self.epochs} epochs"

    def make_inputs(self, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, CLASSES, (self.images,), generator=generator)
        colours = torch.randint(60, 196, (CLASSES, 3), generator=generator)
        noise = torch.randint(-60, 60, (self.images, 32, 32, 3), generator=generator)
        images = (colours[labels][:, None, None, :] + noise).to(torch.uint8)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = resnet18(CLASSES, self.width).eval()
        return Inputs(ImageSet(images, labels, tuple(map(str, range(CLASSES)))), model, device)


@functools.lru_cache(maxsize=16)
def _flops(width: int) -> flops.Flops:
    return flops.per_image(resnet18(CLASSES, width))


@dataclass(frozen=True)
class Inputs:
    """The inputs of a rung; ``around`` takes every loader and returns the one to use."""

    data: ImageSet
    model: nn.Module
    device: torch.device
    around: Around = lambda loader: loader

    def model_copy(self) -> nn.Module:
        return copy.deepcopy(self.model).to(self.device)

    def pil_loader(self, drawn: bool) -> Any:
        """As the script loads; ``drawn``: with crop, flip and shuffling."""
        pictures = plain.Pictures(self.data, NORMALIZE, Augment() if drawn else None)
        return self.around(DataLoader(pictures, BATCH, shuffle=drawn))

    def device_loader(self, drawn: bool) -> Any:
        return self.around(
            DeviceLoader(
                self.data.images,
                self.data.labels,
                BATCH,
                shuffle=drawn,
                device=self.device,
                augment="cifar" if drawn else None,
                normalize=NORMALIZE,
            )
        )


def select(op: str, shapes: Any, quick: bool, device: torch.device) -> list[LoopCase]:
    """The suite's cases; shapes are (width, images, epochs)."""
    if shapes:
        return [LoopCase(op, *shape) for shape in shapes]
    if quick:
        return [LoopCase(op, 8, 256)]
    # Ten epochs are a user's run, in which a trial of arrangements pays.
    full, small = ((1000, 10), (256, 2)) if op == "loop" else ((1000, 1), (256, 1))
    if device.type == "cuda":
        return [LoopCase(op, 64, *full)]
    return [LoopCase(op, 16, *full), LoopCase(op, 64, *small)]
