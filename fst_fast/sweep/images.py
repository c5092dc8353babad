"""The images of a sweep: read and uploaded once, and under each model's own labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import class_names, image_sets
from ..data.device_loader import DeviceLoader
from ..data.image_sets import ImageSet
from .config import Config, normalization_of


@dataclass(frozen=True)
class Sets:
    """The images that a configuration names, under the labels of their own classes.

    Attributes:
        tuning: to tune on.
        test: to measure on; None measures on the tuning images.
        names: from their classes to the models'; None goes by the classes' names alone.
    """

    tuning: ImageSet
    test: ImageSet | None
    names: dict[str, int] | None

    @classmethod
    def read(cls, config: Config) -> Sets:
        """Read what is named.

        Raises:
            ValueError: it cannot be read.
        """
        names = None
        if config.classes is not None:
            names = class_names.read_names(config.classes, "sweep: classes")
        test = None if config.test is None else _read("test", config.test, config.size)
        return cls(_read("data", config.data, config.size), test, names)

    @property
    def judged(self) -> ImageSet:
        """The images to measure on."""
        return self.tuning if self.test is None else self.test

    def plan(self) -> dict[str, Any]:
        """Return the facts in which two runs of a sweep must agree."""
        plan = {
            "data": self.tuning.describe(),
            "test": None if self.test is None else self.test.describe(),
        }
        return plan if self.names is None else {**plan, "classes": self.names}


class Uploaded:
    """The images on one device; their labels are those of the model that was fitted last.

    Attributes:
        judged: the images to measure on.
    """

    def __init__(self, config: Config, sets: Sets, device: torch.device) -> None:
        self._config, self._sets, self._device = config, sets, device
        self._tuning = self._loader(sets.tuning.images, sets.tuning.labels)
        self.judged = self._loader(sets.judged.images, sets.judged.labels, shuffle=False)

    def fit(self, model: nn.Module) -> None:
        """Give the images the model's labels; the bytes stay where they are.

        Raises:
            ValueError: it is not certain which these are.
        """
        first, config = self._tuning, self._config
        labels = self._labels(self._sets.tuning, model, "data", config.data)
        self._tuning = self._loader(first.images, labels, resident=first.resident)
        first, path = self.judged, config.test or config.data
        labels = self._labels(self._sets.judged, model, "test", path)
        self.judged = self._loader(first.images, labels, resident=first.resident, shuffle=False)

    def drawn(self, seed: int) -> DeviceLoader:
        """Return the tuning images under a seed."""
        augment = None if self._config.augment == "none" else self._config.augment
        first, drawn = self._tuning, {"seed": seed, "augment": augment}
        return self._loader(first.images, first.labels, resident=first.resident, **drawn)

    def _labels(self, images: ImageSet, model: nn.Module, key: str, path: Path) -> Tensor:
        return class_names.fit_model(
            images,
            model,
            normalization_of(self._config.normalize),
            self._sets.names,
            labelled=path.suffix == ".npz",
            where=f"sweep: {key}",
            option="classes:",
        ).labels

    def _loader(self, images: Tensor, labels: Tensor, **more: Any) -> DeviceLoader:
        return DeviceLoader(
            images,
            labels,
            self._config.batch_size,
            device=self._device,
            normalize=normalization_of(self._config.normalize),
            **more,
        )


def _read(key: str, path: Path, size: int | None) -> ImageSet:
    try:
        return image_sets.read(path, size)
    except ValueError as error:
        raise ValueError(
            f"sweep: {key} must be a folder with one sub-folder of images per class, or an .npz, "
            f"got {path}: {error}"
        ) from None
