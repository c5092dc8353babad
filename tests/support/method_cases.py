"""A smooth network in float64 and the loop's arithmetic, for transcriptions of methods."""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

import fst_fast

LR, MOMENTUM, SEED = 0.02, 0.9, 3
CLASSES = 5


class SmoothNet(nn.Module):
    """Batch norm, a residual and a head; smooth, so that rounding is not blown up at a kink."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.classify = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = F.silu(self.bn1(self.conv1(x)))
        x = F.silu(x + self.bn2(self.conv2(x)))
        return self.classify(x.mean((2, 3)))


def problem(steps, size=12, dtype=torch.float64):
    """A model and so many batches."""
    torch.manual_seed(0)
    model = SmoothNet().to(dtype)
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
        model.classify.weight.mul_(3)
    batches = [
        (torch.randn(size, 3, 8, 8, dtype=dtype), torch.randint(0, CLASSES, (size,)))
        for _ in range(steps)
    ]
    return model, batches


class OneBatchPerEpoch:
    """Epoch t yields batch t alone, so that the history holds the loss of every step."""

    def __init__(self, batches):
        self.batches = batches
        self.at = 0

    def set_epoch(self, epoch):
        self.at = epoch

    def __iter__(self):
        yield self.batches[self.at]


def run(model, batches, method, **more):
    """Purify with one step in an epoch."""
    settings = {"epochs": len(batches), "lr": LR, "momentum": MOMENTUM, "seed": SEED}
    settings |= {"precision": "fp32", "device": "cpu", "progress": False}
    # The labels are drawn at random, and no model's own.
    settings["check"] = False
    return fst_fast.purify(
        model, OneBatchPerEpoch(batches), **{**settings, "method": method, **more}
    )


def redrawn(model):
    """A copy in train mode with the head that the seed draws, and the original head's weight."""
    model = copy.deepcopy(model).train()
    weight, bias = model.classify.weight, model.classify.bias
    weight0 = weight.detach().clone()
    generator = torch.Generator().manual_seed(SEED)
    bound = 1 / math.sqrt(weight.shape[1])
    with torch.no_grad():
        for parameter in (weight, bias):
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(drawn)
    return model, weight0


class Descent:
    """SGD with momentum under the loop's cosine schedule, one step an epoch."""

    def __init__(self, model, steps):
        self.parameters, self.steps, self.done = list(model.parameters()), steps, 0
        self.velocity = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients):
        # The loop holds the learning rate on the device, in float32.
        lr = torch.tensor(LR * 0.5 * (1 + math.cos(math.pi * self.done / self.steps))).item()
        self.done += 1
        for p, v, g in zip(self.parameters, self.velocity, gradients, strict=True):
            v.mul_(MOMENTUM).add_(g)
            p.sub_(lr * v)


def forget(model, images, labels, lr, forgotten, passes):
    """The ascent in one straight line; also the accuracy of each pass."""
    model = copy.deepcopy(model).train()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    seen = []
    for _ in range(passes):
        rows = torch.randint(len(labels), (len(labels),))
        logits = model(images[rows])
        loss = -F.cross_entropy(logits, labels[rows])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        length = torch.cat([g.flatten() for g in gradients]).norm()
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g * min(1, (20 / length).item()))
                p.sub_(lr * v)
        seen.append((logits.argmax(1) == labels[rows]).double().mean().item())
        if seen[-1] <= forgotten:
            break
    return model, seen


def assert_follows(result, losses, truth, tolerance=1e-10):
    """The run's losses and final model are those of the transcription."""
    got = torch.tensor([record.loss for record in result.history], dtype=torch.float64)
    assert_near(got, torch.tensor(losses, dtype=torch.float64), tolerance, "losses")
    final = truth.state_dict()
    for key, value in result.model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert_near(value.double(), final[key].double(), tolerance, key)


def assert_near(got, want, tolerance, name):
    error = (got - want).abs().max() / want.abs().max().clamp_min(1e-12)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
