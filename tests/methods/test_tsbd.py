"""tsbd: what moves most when clean images are unlearnt is set back, and the rest tuned smoothly."""

import copy

import pytest
import torch
from method_cases import SEED, Descent, assert_follows, forget, problem, run
from purify_cases import make_batches, quick
from torch import nn
from torch.nn import functional as F

from fst_fast import methods
from fst_fast.methods import tsbd

STEPS = 40
CONVOLUTIONS = ("conv1", "conv2")


def emptied(model, forgetful, count, zeroed):
    """The suspect with so many filters emptied, one after the other."""
    model = copy.deepcopy(model)
    changes = {}
    for name in CONVOLUTIONS:
        moved = forgetful.get_submodule(name).weight - model.get_submodule(name).weight
        for row in range(len(moved)):
            changes[name, row] = moved[row].abs().sum().item()
    for name, row in sorted(changes, key=changes.get)[::-1][:count]:
        weight = model.get_submodule(name).weight
        moved = (forgetful.get_submodule(name).weight[row] - weight[row]).abs().flatten()
        order = moved.argsort().flip(0)[: round(zeroed * len(moved))]
        with torch.no_grad():
            weight[row].view(-1)[order] = 0
    return model


def transcribe(model, batches, smooth, rho):
    """The second stage in one straight line."""
    model = copy.deepcopy(model).train()
    descent, losses = Descent(model, len(batches)), []
    for images, labels in batches:
        weights = list(model.parameters())
        loss = F.cross_entropy(model(images), labels)
        first = torch.autograd.grad(loss, weights)
        losses.append(loss.item())
        moved = {
            name: (w + rho * g / g.norm()).detach().requires_grad_()
            for (name, w), g in zip(model.named_parameters(), first, strict=True)
        }
        moved |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        there = F.cross_entropy(torch.func.functional_call(model, moved, images), labels)
        second = torch.autograd.grad(there, [moved[name] for name, _ in model.named_parameters()])
        descent.step([(1 - smooth) * g + smooth * h for g, h in zip(first, second, strict=True)])
    return losses, model


def unlearnable(steps):
    """A problem whose first batch is answered rightly, so that there is something to forget."""
    model, batches = problem(steps)
    answers = copy.deepcopy(model).train()(batches[0][0]).argmax(1)
    batches[0] = (batches[0][0], answers)
    return model, batches


@pytest.mark.parametrize(("smooth", "rho", "zeroed"), [(0.7, 0.05, 0.7), (0.3, 0.5, 0.4)])
def test_it_follows_the_transcription(smooth, rho, zeroed):
    model, batches = unlearnable(STEPS)
    settings = {"smooth": smooth, "rho": rho, "zeroed": zeroed, "unlearn_lr": 0.05}
    method = methods.get("tsbd", **settings, passes=15, most_lost=1.0)
    result = run(model, batches, method)
    torch.manual_seed(SEED)
    forgetful, seen = forget(model, *batches[0], 0.05, 0.1, 15)
    # All that may be lost is lost, so that the greatest share of the filters goes.
    start = emptied(model, forgetful, round(0.95 * 16), zeroed)
    assert seen[-1] < 0.5 < seen[0]
    assert_follows(result, *transcribe(start, batches, smooth, rho))
    plain = run(start, batches, methods.get("ft"))
    assert (plain.model.conv1.weight - result.model.conv1.weight).abs().max() > 1e-3


@pytest.mark.parametrize(("most_lost", "count"), [(0.0, 0), (0.075, 2), (0.1, 2), (1.0, 15)])
def test_as_many_filters_go_as_the_accuracy_allows(most_lost, count):
    """An emptied filter of the second layer costs 0.036 here."""
    torch.manual_seed(0)
    model, forgetful = (problem(1)[0] for _ in range(2))
    with torch.no_grad():
        for parameter in forgetful.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = emptied(model, forgetful, count, 0.5)

    class Counting:
        def clean_accuracy(self):
            zeros = sum((model.get_submodule(n).weight == 0).sum().item() for n in CONVOLUTIONS)
            return 1.0 - 0.001 * zeros

    weights, moved = (
        [m.get_submodule(name).weight for name in CONVOLUTIONS] for m in (model, forgetful)
    )
    tsbd.set_back(Counting(), weights, moved, 0.5, most_lost)
    assert torch.equal(model.conv1.weight, expected.conv1.weight)
    assert torch.equal(model.conv2.weight, expected.conv2.weight)


def test_without_a_second_gradient_it_is_plain_tuning():
    model, batches = problem(5)
    method = methods.get("tsbd", smooth=0.0, zeroed=0.0)
    ours, theirs = (run(model, batches, one) for one in (method, methods.get("ft")))
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert ours.model.bn1.num_batches_tracked == 5


def test_a_model_without_a_convolution_is_refused_and_left():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    before = model[1].weight.clone()
    with pytest.raises(ValueError, match=r"tsbd: model must have a convolution, got Sequential"):
        quick(model, make_batches(), method="tsbd", inplace=True)
    assert torch.equal(model[1].weight, before)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"zeroed": 1.2}, r"tsbd: zeroed must be a number in 0..1, got 1.2; the default is 0.7"),
        ({"passes": -1}, r"tsbd: passes must be an integer >= 0, got -1"),
        ({"rho": -1}, r"tsbd: rho must be a number >= 0, got -1"),
        ({"smooth": 2}, r"tsbd: smooth must be a number in 0..1, got 2"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("tsbd", **settings)
