"""A small problem, and what purify makes of it, for the tests of other people's loops."""

import torch
from torch import nn
from torch.nn import functional as F

import fst_fast

EPOCHS, BATCH, PER_EPOCH = 3, 16, 3
LR, MOMENTUM, ALPHA, SEED = 0.05, 0.9, 0.1, 3


class Net(nn.Module):
    """Smooth, so that a rounding difference is not blown up at a kink.

    Without a batch norm, parts of a batch add up to the batch.
    """

    def __init__(self, batch_norm=False, softmax=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if batch_norm else nn.GroupNorm(2, 8)
        self.classify, self.softmax = nn.Linear(8, 5), softmax

    def forward(self, x):
        logits = self.classify(F.silu(self.norm(self.conv(x))).mean((2, 3)))
        return logits.softmax(1) if self.softmax else logits


def problem(**more):
    """A model and its batches."""
    torch.manual_seed(0)
    model = Net(**more)
    with torch.no_grad():
        model.classify.weight.mul_(3)
    images = torch.randn(PER_EPOCH * BATCH, 3, 8, 8)
    labels = torch.randint(0, 5, (PER_EPOCH * BATCH,))
    return model, list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def purified_state(**more):
    """The state in which purify ends on the problem."""
    model, batches = problem(**more)
    settings = {"method": "fst", "alpha": ALPHA, "epochs": EPOCHS, "lr": LR, "momentum": MOMENTUM}
    settings |= {"seed": SEED, "device": "cpu", "precision": "fp32", "progress": False}
    # The labels were drawn at random.
    state = fst_fast.purify(model, batches, check=False, **settings).model.state_dict()
    moved = (state["classify.weight"] - model.classify.weight).abs().max()
    assert moved > 0.1  # the comparison is not of models that never moved
    return state


def prepare(model, alpha=ALPHA, attach=True):
    """A user makes the criterion and the optimizer before the loop."""
    criterion = fst_fast.HeadDeviationLoss.from_model(model, alpha, head="classify")
    criterion.reinitialize(SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    if attach:
        fst_fast.attach(optimizer, criterion)
    return criterion, optimizer


def loss_by(form, criterion, model, images, labels):
    if form == "features":
        return criterion(criterion.features_of(model, images), labels)
    return criterion.from_logits(model(images), labels)


def difference(state, purified):
    """The largest difference of a tensor, relative to its largest element."""
    return max(
        ((state[key] - value).abs().max() / value.abs().max().clamp_min(1e-12)).item()
        for key, value in purified.items()
    )
