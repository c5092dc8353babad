"""ft_sam: the gradient of a step is that at the worst weights nearby."""

import pytest
import torch
from method_cases import Descent, assert_follows, problem, run
from torch import nn
from torch.nn import functional as F

from fst_fast import methods
from fst_fast.methods.ft_sam import adaptive_ascent

STEPS = 40


def transcribe(model, batches, rho, smoothing):
    """The published algorithm in one straight line."""
    model = model.train()
    descent, losses = Descent(model, len(batches)), []
    for images, labels in batches:
        weights = list(model.parameters())
        loss = F.cross_entropy(model(images), labels, label_smoothing=smoothing)
        g = torch.autograd.grad(loss, weights)
        losses.append(loss.item())
        length = sum(((w.abs() * d) ** 2).sum() for w, d in zip(weights, g, strict=True)).sqrt()
        moved = {
            name: (w + rho * w**2 * d / length).detach().requires_grad_()
            for (name, w), d in zip(model.named_parameters(), g, strict=True)
        }
        # The copies of the buffers take up what the second pass measures.
        moved |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        output = torch.func.functional_call(model, moved, images)
        second = F.cross_entropy(output, labels, label_smoothing=smoothing)
        there = [moved[name] for name, _ in model.named_parameters()]
        descent.step(torch.autograd.grad(second, there))
    return losses, model


@pytest.mark.parametrize(("rho", "smoothing"), [(2.0, 0.1), (0.5, 0.0)])
def test_it_follows_the_transcription(rho, smoothing):
    model, batches = problem(STEPS)
    method = methods.get("ft_sam", rho=rho, label_smoothing=smoothing)
    result = run(model, batches, method)
    assert_follows(result, *transcribe(model, batches, rho, smoothing))
    # The neighbourhood matters: plain tuning ends elsewhere.
    plain = run(problem(1)[0], batches, methods.get("ft_sam", rho=0.0, label_smoothing=smoothing))
    apart = result.model.classify.weight - plain.model.classify.weight
    assert apart.abs().max() > 1e-2


def test_a_radius_of_zero_is_plain_tuning():
    model, batches = problem(5)
    ours = run(model, batches, methods.get("ft_sam", rho=0.0, label_smoothing=0.0))
    theirs = run(model, batches, methods.get("ft"))
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert ours.model.bn1.num_batches_tracked == 5


def test_the_ascent_has_the_length_that_was_asked_for():
    """||T^-1 e|| = rho, and e climbs."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    weights = list(layer.parameters())
    layer(torch.randn(7, 5, dtype=torch.float64)).square().sum().backward()
    moves = adaptive_ascent(weights, 1.7)
    lengths = [(e / w.abs()).square().sum() for e, w in zip(moves, weights, strict=True)]
    assert sum(lengths).sqrt().item() == pytest.approx(1.7)
    assert sum((e * w.grad).sum() for e, w in zip(moves, weights, strict=True)) > 0


def test_without_a_gradient_nothing_moves():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    assert torch.equal(adaptive_ascent([weight], 2.0)[0], torch.zeros(3))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rho": -0.1}, r"ft_sam: rho must be a number >= 0, got -0.1; the default is 2.0"),
        ({"label_smoothing": 1.5}, r"ft_sam: label_smoothing must be a number in 0..1, got 1.5"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("ft_sam", **settings)
