"""Networks for 32 x 32 images: residual ones (He et al., arXiv 1512.03385, 1603.05027) and VGG.

The ImageNet networks of torchvision shrink a 32 x 32 image to one pixel; these use the usual
CIFAR forms instead: the residual ones with a 3x3 stem, no max-pooling and the first stage at full
resolution, VGG with one linear layer behind its convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints import architectures


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the (projected) input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def _stages(
    block: Callable[[int, int, int], nn.Module], counts: Sequence[int], width: int
) -> tuple[nn.Sequential, int]:
    """So many blocks in each stage, and the channels behind the last one."""
    layers: list[nn.Module] = []
    channels = width
    for stage, count in enumerate(counts):
        for number in range(count):
            stride = 2 if stage > 0 and number == 0 else 1
            layers.append(block(channels, width * 2**stage, stride))
            channels = width * 2**stage
    return nn.Sequential(*layers), channels


class ResNet(nn.Module):
    """A residual network for small images.

    Args:
        blocks: residual blocks in each stage; every stage after the first halves the resolution
            and doubles the channels.
        num_classes: outputs of the head.
        width: channels of the first stage.
        in_channels: channels of the input, 1, 3 or 4.
    """

    def __init__(
        self, blocks: Sequence[int], num_classes: int, width: int = 64, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.blocks, channels = _stages(BasicBlock, blocks, width)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def resnet18(num_classes: int = 10, width: int = 64, in_channels: int = 3) -> ResNet:
    """ResNet-18 in its CIFAR form; width 64 is the published one (11.2 M parameters)."""
    return ResNet((2, 2, 2, 2), num_classes, width, in_channels)


def resnet8(num_classes: int = 10, width: int = 16, in_channels: int = 3) -> ResNet:
    """Three stages of one block: trains on a laptop's CPU in seconds."""
    return ResNet((1, 1, 1), num_classes, width, in_channels)


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, added to the (projected) input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        # A projection comes after the activation, the identity before it.
        passed = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + passed


class PreActResNet(nn.Module):
    """A residual network with identity mappings; arguments as of :class:`ResNet`."""

    def __init__(
        self, blocks: Sequence[int], num_classes: int, width: int = 64, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.blocks, channels = _stages(PreActBlock, blocks, width)
        # The paper's extra activation behind the last block.
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(features.mean(dim=(2, 3)))


class VGG(nn.Module):
    """3x3 convolutions with batch norm and ReLU in stages that each end in 2x2 max-pooling.

    Args:
        convolutions: how many in each stage; the channels double from one stage to the next, up to
            eight times the width.
        num_classes, width, in_channels: as of :class:`ResNet`.
    """

    def __init__(
        self, convolutions: Sequence[int], num_classes: int, width: int = 64, in_channels: int = 3
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, count in enumerate(convolutions):
            out_channels = width * min(2**stage, 8)
            for _ in range(count):
                layers.append(nn.Conv2d(channels, out_channels, 3, padding=1))
                layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
                channels = out_channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


def preactresnet18(num_classes: int = 10, width: int = 64, in_channels: int = 3) -> PreActResNet:
    """PreActResNet-18 in its CIFAR form; width 64 is the published one (11.2 M parameters)."""
    return PreActResNet((2, 2, 2, 2), num_classes, width, in_channels)


def vgg19_bn(num_classes: int = 10, width: int = 64, in_channels: int = 3) -> VGG:
    """VGG-19 with batch norm in its CIFAR form, of 32 x 32 images or larger.

    Sixteen convolutions (Simonyan and Zisserman, arXiv 1409.1556) and one linear layer; width 64
    is the published one (20.0 M parameters).
    """
    return VGG((2, 2, 4, 4, 4), num_classes, width, in_channels)


# Name on the command line -> function above.
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

    Example:
        >>> fst_fast.lab.network("resnet18:16").options
        {'width': 16}
    """
    base, colon, width = name.partition(":")
    if base not in OWN:
        if colon:
            raise ValueError(f"lab: arch must be one of {_FORMS}, got {name!r}")
        return Network(name, {})
    arch = f"{__name__}:{OWN[base]}"
    if not colon:
        return Network(arch, {})
    if not (width.isascii() and width.isdigit() and int(width[:6]) >= 1 and len(width) <= 6):
        raise ValueError(
            f"lab: arch must have a whole number of 1 or more as its width, got {name!r}; write "
            f"{base}:16"
        )
    return Network(arch, {"width": int(width)})
