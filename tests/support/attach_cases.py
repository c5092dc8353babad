"""A model whose head looks trained, an optimizer and a step, shared by the tests of attach."""

import torch
from purify_cases import make_batches, make_model
from torch.nn import functional as F

LR = 0.05


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def trained_model():
    """By its looks: the head is larger than nn.Linear draws it."""
    model = make_model()
    with torch.no_grad():
        model[-1].weight.mul_(3)
    return model


def run_step(model, optimizer, batch=None, scaler=None):
    images, labels = batch or make_batches(1)[0]

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    if scaler is None:
        optimizer.step(closure)
    else:
        closure()
        scaler.step(optimizer)
        scaler.update()


def norm_of(head):
    return head.weight.detach().double().norm().item()
