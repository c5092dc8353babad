"""Small residual networks for 32 x 32 images, built as in He et al. 2016 (arXiv 1512.03385).

The ImageNet networks of torchvision shrink a 32 x 32 image to one pixel; these use the usual
CIFAR form instead: a 3x3 stem, no max-pooling, and the first stage at full resolution.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


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
        layers: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            out_channels = width * 2**stage
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(channels, out_channels, stride))
                channels = out_channels
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def resnet18(num_classes: int = 10, width: int = 64, in_channels: int = 3) -> ResNet:
    """ResNet-18 in its CIFAR form; width 64 is the published one (11.2 M parameters)."""
    return ResNet((2, 2, 2, 2), num_classes, width, in_channels)


def resnet8(num_classes: int = 10, width: int = 16, in_channels: int = 3) -> ResNet:
    """Three stages of one block: trains on a laptop's CPU in seconds."""
    return ResNet((1, 1, 1), num_classes, width, in_channels)
