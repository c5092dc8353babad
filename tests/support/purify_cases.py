"""A small model, small batches and a quick run, shared by the tests of purify."""

import torch
from torch import nn

import fst_fast

CLASSES = 4


def make_model(channels=3, classes=CLASSES, **more):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


class OnlyWhenTraining(nn.Module):
    """Divides its logits, but in eval mode does not."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) / 2 if self.training else self.net(x)


class InPlaceWhenTraining(OnlyWhenTraining):
    """Writes into its logits, but in eval mode does not."""

    def forward(self, x):
        logits = self.net(x)
        return logits.div_(2) if self.training else logits


def make_batches(count=3, size=8, channels=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, channels, 8, 8, generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def quick(model, loader, **more):
    fixed = {"alpha": None, "epochs": 2, "progress": False, "device": "cpu", "precision": "fp32"}
    # The labels are drawn at random, and no model's own.
    fixed["check"] = False
    # No trial of what is faster here: runs are compared bit by bit.
    fixed |= {"channels_last": True, "threads": torch.get_num_threads()}
    return fst_fast.purify(model, loader, **{**fixed, **more})


def equal_states(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


def bad_batch(change):
    images, labels = make_batches(1)[0]
    return [change(images, labels)]


def with_value(images, value):
    images = images.clone()
    images[1, 2, 3, 4] = value
    return images


def assert_same_run(one, other):
    """The same bits, but for the clock."""
    assert equal_states(one.model.state_dict(), other.model.state_dict())
    mine, theirs = (
        [(r.epoch, r.loss, r.clean_accuracy, r.cosine, r.norm) for r in run.history]
        for run in (one, other)
    )
    assert mine == theirs
    assert one.head_shift == other.head_shift
    assert one.stopped == other.stopped
