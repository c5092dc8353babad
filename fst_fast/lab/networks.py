"""Architectures by name: the lab's own at any width, and those of torchvision and timm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..checkpoints import architectures
from . import models

# Name on the command line -> function in fst_fast.lab.models.
OWN = {
    "resnet8": "resnet8",
    "resnet18": "resnet18",
    "preactresnet18": "preactresnet18",
    "vgg19-bn": "vgg19_bn",
}
_FORMS = f"{', '.join(OWN)}, each with :WIDTH or without, or a torchvision or timm name"


@dataclass(frozen=True)
class Network:
    """An architecture as ``fst-fast purify`` takes it.

    Attributes:
        arch: for ``--arch`` and :func:`fst_fast.load`.
        options: for ``--arch-option``.
    """

    arch: str
    options: dict[str, Any]

    def build(self, num_classes: int) -> nn.Module:
        """The untrained model; raises as :func:`fst_fast.checkpoints.architectures.build`."""
        return architectures.build(self.arch, num_classes, **self.options)

    @property
    def arguments(self) -> str:
        """On the command line."""
        options = "".join(f" --arch-option {name}={value}" for name, value in self.options.items())
        return f"--arch {self.arch}{options}"


def network(name: str) -> Network:
    """The architecture of this name.

    Code of the user's own is not taken by name here: a manifest may name the architecture, and
    anybody can write a manifest.

    Args:
        name: "resnet18:16" (of width 16), "preactresnet18", "vgg19-bn", "resnet8", or a torchvision
            or timm name; "torchvision/NAME" for one that has a form here as well. Whether a library
            knows the name shows in building.
    Raises:
        ValueError: a width that is no whole number of 1 or more, or one where there is none.
    """
    base, colon, width = name.partition(":")
    if base not in OWN:
        if colon:
            raise ValueError(f"lab: arch must be one of {_FORMS}, got {name!r}")
        return Network(name, {})
    arch = f"{models.__name__}:{OWN[base]}"
    if not colon:
        return Network(arch, {})
    if not (width.isascii() and width.isdigit() and int(width[:6]) >= 1 and len(width) <= 6):
        raise ValueError(
            f"lab: arch must have a whole number of 1 or more as its width, got {name!r}; write "
            f"{base}:16"
        )
    return Network(arch, {"width": int(width)})
