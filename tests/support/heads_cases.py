"""Models for the tests of find_head, and the way they check a refusal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fst_fast.heads.find import AmbiguousHeadError, find_head


class Net(nn.Module):
    """Two convolutions, then ``make(net, features)``; the true head is called ``zzz``."""

    def __init__(self, make=lambda net, x: net.zzz(x), classes=4, **modules):
        super().__init__()
        # Registered first, named like a head, of the head's shape, and not the head.
        self.zzz = nn.Linear(8, classes)
        self.fc = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.make = make

    def features(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3))).relu()

    def forward(self, x):
        return self.make(self, self.features(x))


def refusal(model, *words, error=AmbiguousHeadError, **options):
    """find_head refuses, the message has all the words and the remedy."""
    with pytest.raises(error) as caught:
        find_head(model, **options)
    message = str(caught.value)
    assert type(caught.value) is error
    for word in (*words, "head="):
        assert word in message, message
    return message


def two_heads(make, **modules):
    return Net(make, other=nn.Linear(8, 4), **modules)


class Cosine(nn.Linear):
    def forward(self, x):
        return 16 * F.linear(F.normalize(x), F.normalize(self.weight))


def scaled():
    model = Net(lambda net, x: net.zzz(x) * net.scale)
    model.scale = nn.Parameter(torch.ones(()))
    return model


def tied():
    model = two_heads(lambda net, x: net.zzz(x))
    model.other.weight = model.zzz.weight
    return model


def parametrised(how):
    model = Net()
    how(model.zzz)
    return model
