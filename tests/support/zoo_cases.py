"""One trigger of each class of the zoo, for images of one size."""

import torch
from torch import nn

from fst_fast import triggers


class Pattern(nn.Module):
    """Stands for a generator: its own mixture of the image's channels."""

    def __init__(self, channels, out, squash):
        super().__init__()
        torch.manual_seed(channels)
        self.mix = nn.Conv2d(channels, out, 3, padding=1)
        self.norm = nn.BatchNorm2d(out)
        self.squash = squash

    def forward(self, x):
        return self.squash(self.norm(self.mix(x)))


def networks(channels):
    return Pattern(channels, channels, torch.tanh), Pattern(channels, 1, torch.sigmoid)


def make(name, images):
    """The trigger of that name, given what it needs for these images [N, H, W, C]."""
    generator = torch.Generator().manual_seed(7)
    if name == "siba":
        pattern = torch.zeros(images.shape[1:], dtype=torch.int16)
        pattern[1, 2], pattern[-1, -1] = 8, -5
        return triggers.SIBA(pattern)
    if name == "input-aware":
        return triggers.InputAware(*networks(images.shape[-1]), ((0.5,) * 3, (0.25,) * 3))
    if name in ("ssba", "poison-ink"):
        made = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
        return triggers.ZOO[name](made)
    return triggers.get(name)
