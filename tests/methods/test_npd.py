"""npd: a linear layer learns to hold adversarial changes back, and becomes part of the suspect."""

import copy

import pytest
import torch
from method_cases import assert_near, problem, run
from purify_cases import make_batches, quick
from torch import nn
from torch.nn import functional as F

from fst_fast import methods
from fst_fast.methods.norms import convolution_norms
from fst_fast.methods.polarizer import Polarizer, place_for

STEPS = 30


def with_layer(model, images, matrix, shift):
    """The small network in eval mode with the layer behind its first batch norm."""
    x = model.bn1(model.conv1(images))
    x = torch.einsum("oc,bchw->bohw", matrix, x) + shift[:, None, None]
    x = F.silu(x)
    x = F.silu(x + model.bn2(model.conv2(x)))
    return model.classify(x.mean((2, 3)))


def transcribe(model, batches, radius, steps, adversarial, target, others, lr):
    """The algorithm in one straight line; returns the losses, A and b."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    low, high = (
        extreme(batches[0][0], (0, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax)
    )
    matrix, shift = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    velocity, losses = [torch.zeros_like(matrix), torch.zeros_like(shift)], []
    for images, labels in batches:
        matrix.requires_grad_()
        shift.requires_grad_()
        p = torch.softmax(with_layer(model, images, matrix, shift), 1)
        rows = torch.arange(len(labels))
        wrong = torch.tensor(
            [
                max((k for k in range(5) if k != y), key=p[row].tolist().__getitem__)
                for row, y in enumerate(labels.tolist())
            ]
        )
        change = torch.zeros_like(images)
        for _ in range(steps):
            change.requires_grad_()
            shown = torch.minimum(torch.maximum(images + change * (high - low), low), high)
            q = torch.softmax(with_layer(model, shown, matrix.detach(), shift.detach()), 1)
            (slope,) = torch.autograd.grad(-q[rows, wrong].log().sum(), change)
            change = change.detach()
            for row in range(len(labels)):
                change[row] -= radius / steps * slope[row] / slope[row].square().sum().sqrt()
        shown = torch.minimum(torch.maximum(images + change * (high - low), low), high)
        q = torch.softmax(with_layer(model, shown, matrix, shift), 1)
        loss = -p[rows, labels].log().mean() - adversarial * q[rows, labels].log().mean()
        loss = loss - target * (1 - q[rows, wrong]).log().mean()
        for row, y in enumerate(labels.tolist()):
            worst = max(q[row, k] for k in range(5) if k != y)
            loss = loss - others * (1 - worst).log() / len(labels)
        found = torch.autograd.grad(loss, [matrix, shift])
        velocity = [0.9 * v + g for v, g in zip(velocity, found, strict=True)]
        matrix, shift = matrix.detach() - lr * velocity[0], shift.detach() - lr * velocity[1]
        losses.append(loss.item())
    return losses, matrix, shift


@pytest.mark.parametrize(
    "settings",
    [
        {"radius": 3.0, "steps": 2, "adversarial": 0.4, "target": 0.4, "others": 0.4, "lr": 0.01},
        {"radius": 0.5, "steps": 3, "adversarial": 1.0, "target": 0.2, "others": 0.7, "lr": 0.03},
    ],
)
def test_the_folded_model_computes_what_the_transcription_learns(settings):
    model, batches = problem(STEPS)
    result = run(model, batches, methods.get("npd", **settings))
    losses, matrix, shift = transcribe(model, batches, **settings)
    assert [record.loss for record in result.history] == pytest.approx(losses, rel=1e-10)
    images = batches[0][0]
    wanted = with_layer(copy.deepcopy(model).eval(), images, matrix, shift)
    assert_near(result.model(images), wanted, 1e-10, "logits")
    assert (wanted - model.eval()(images)).abs().max() > 0.1
    # Nothing else has changed.
    before, after = model.state_dict(), result.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    parts = ("weight", "bias", "running_mean", "running_var")
    assert changed == {"conv1.weight", *(f"bn1.{part}" for part in parts)}


@pytest.mark.parametrize("bias", [True, False])
def test_folding_is_exact_and_leaves_the_statistics_of_the_new_input(bias):
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 6, 3, bias=bias).double(), nn.BatchNorm2d(6).double()
    nn.init.uniform_(norm.weight, -1, 1)
    nn.init.normal_(norm.bias)
    images = 2 + torch.randn(500, 3, 6, 6, dtype=torch.float64)
    # The running statistics are those of the images.
    norm.momentum = None
    norm(convolution(images))
    model = nn.Sequential(convolution, norm).eval()
    layer = Polarizer(convolution, norm)
    layer.matrix += torch.randn(6, 6, dtype=torch.float64)
    layer.shift += torch.randn(6, dtype=torch.float64)
    with layer.at_work(layer.matrix, layer.shift):
        wanted = model(images)
    assert not norm._forward_hooks
    layer.fold(lambda: model(images))
    assert_near(model(images), wanted, 1e-12, "outputs")
    made = convolution(images)
    assert_near(norm.running_mean, made.mean((0, 2, 3)), 1e-12, "mean")
    assert_near(norm.running_var, made.var((0, 2, 3), unbiased=False), 1e-12, "variance")


class Shared(nn.Module):
    """Its last but one convolution feeds a batch norm and a sum; the one before has groups."""

    def __init__(self):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.two, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.three, self.norm3 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.four, self.norm4 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = F.relu(self.norm2(self.two(F.relu(self.norm1(self.one(x))))))
        raw = self.three(x)
        x = F.relu(self.norm3(raw)) + raw
        return self.head(self.norm4(self.four(x)).mean((2, 3)))


def test_the_place_is_one_where_folding_is_exact():
    torch.manual_seed(0)
    model, images = Shared().eval(), torch.randn(2, 3, 6, 6)
    assert len(convolution_norms(model, images, "npd")) == 4
    assert place_for(model, images, "npd") == (model.one, model.norm1)
    plain = problem(1)[0].eval()
    assert place_for(plain, images.double(), "npd") == (plain.conv1, plain.bn1)


def test_a_model_without_a_place_is_refused_and_left():
    none = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    grouped = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), nn.Flatten(), nn.Linear(216, 4)
    )
    for model, text in ((none, "a convolution that feeds"), (grouped, "a convolution without gro")):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"npd: model must have {text}.*; use d3, ft_sam"):
            quick(model, make_batches(), method="npd", inplace=True)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"radius": -1}, r"npd: radius must be a number >= 0, got -1; the default is 3.0"),
        ({"steps": 0}, r"npd: steps must be an integer >= 1, got 0"),
        ({"others": "1"}, r"npd: others must be a number >= 0, got '1'"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("npd", **settings)
