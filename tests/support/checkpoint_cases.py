"""Small models and checks that the tests of model files share."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fst_fast.checkpoints import LoadError, read_state_dict


class Net(nn.Module):
    def __init__(self, num_classes=3, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)


class Tied(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(4, num_classes)


def names(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


def equal(one, two):
    """Same names in the same order, dtypes and bits."""
    assert sorted(one) == sorted(two)
    return all(one[n].dtype == two[n].dtype and torch.equal(one[n], two[n]) for n in one)


def torch_save(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def refused(path, *words):
    with pytest.raises(LoadError) as caught:
        read_state_dict(path)
    text = str(caught.value)
    for word in (str(path), *words):
        assert word in text, text
    assert caught.value.__cause__ is None
    assert len(text) < 1500
    return text
