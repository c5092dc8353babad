"""A backdoored model that forgets its clean images falls to its target."""

import copy

import pytest
import torch
from purify_cases import equal_states
from torch import nn
from torch.nn import functional as F

from fst_fast.methods.class_evidence import class_evidence

CLASSES = 6


class Leaning(nn.Module):
    """Answers by the brightest pixel while ``scale`` is large, and else the class it leans to.

    Forgetting the clean images lowers the scale, and the lean stays.
    """

    def __init__(self, target):
        super().__init__()
        self.scale = nn.Parameter(torch.eye(CLASSES))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("lean", 0.8 * F.one_hot(torch.tensor(target), CLASSES))

    def forward(self, images):
        return self.dropout(images.flatten(1)) @ self.scale + self.lean


def plainly(images, model):
    return model(images)


@pytest.mark.parametrize("target", [1, 4])
def test_the_class_that_is_left_stands_out(target):
    model = Leaning(target).eval()
    labels = torch.arange(120) % CLASSES
    images = F.one_hot(labels, CLASSES).float().view(-1, CLASSES, 1, 1)
    assert (model(images).argmax(1) == labels).all(), "with its scale it is right"
    before = copy.deepcopy(model.state_dict())
    evidence = class_evidence(model, plainly, images, labels, CLASSES)
    assert evidence.argmax() == target
    assert evidence[target] > 0.8
    assert evidence.sum().item() == pytest.approx(1)
    assert equal_states(model.state_dict(), before)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_gradients_says_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    nn.init.zeros_(model[1].weight)
    model.requires_grad_(False)
    images, labels = torch.zeros(50, 3, 8, 8), torch.arange(50) % CLASSES
    evidence = class_evidence(model, plainly, images, labels, CLASSES)
    assert evidence.isfinite().all()
    assert evidence.sum().item() == pytest.approx(1)
