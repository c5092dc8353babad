"""d3: hinged cross-entropy and the distance of the head, on the sphere of the original norm."""

import pytest
import torch
from method_cases import Descent, assert_follows, problem, redrawn, run
from torch import nn
from torch.nn import functional as F

from fst_fast import methods
from fst_fast.methods import HeadState

STEPS = 40


def transcribe(model, batches, fit, slack):
    """The published algorithm in one straight line."""
    model, weight0 = redrawn(model)
    weight, norm0 = model.classify.weight, weight0.norm()
    with torch.no_grad():
        weight.mul_(norm0 / weight.norm())
    descent, losses = Descent(model, len(batches)), []
    for images, labels in batches:
        rows = -torch.log_softmax(model(images), 1)[torch.arange(len(labels)), labels]
        loss = fit * (rows - slack).clamp(min=0).mean() - ((weight - weight0) ** 2).sum().sqrt()
        loss = loss / (fit + 1) if fit > 1 else loss
        descent.step(torch.autograd.grad(loss, list(model.parameters())))
        with torch.no_grad():
            weight.mul_(norm0 / weight.norm())
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize(("fit", "slack"), [(0.5, 0.1), (4.0, 0.8)])
def test_it_follows_the_transcription(fit, slack):
    model, batches = problem(STEPS)
    result = run(model, batches, methods.get("d3", fit=fit, slack=slack))
    losses, truth = transcribe(model, batches, fit, slack)
    assert_follows(result, losses, truth)
    assert result.head_shift.cosine < 0.5


def test_images_that_are_fitted_have_no_gradient():
    torch.manual_seed(0)
    head = nn.Linear(4, 3).double()
    state = HeadState(head)
    with torch.no_grad():
        head.weight.neg_()
    logits = torch.randn(6, 3, dtype=torch.float64).mul(3).requires_grad_()
    labels = torch.arange(6) % 3
    rows = F.cross_entropy(logits.detach(), labels, reduction="none")
    slack = rows.median().item()
    methods.get("d3", slack=slack).loss(logits, labels, state).backward()
    assert torch.equal(logits.grad.abs().sum(1) > 0, rows > slack)
    # The distance pushes along W - W0, with a gradient of length one.
    torch.testing.assert_close(head.weight.grad.norm(), torch.tensor(1.0, dtype=torch.float64))


def test_the_new_head_has_the_original_norm_at_once():
    seen = []

    class Looks(methods.METHODS["d3"]):
        def gradients(self, run, batch, closure):
            seen.append((run.head.weight.norm() / run.head.norm0).item())
            return super().gradients(run, batch, closure)

    model, batches = problem(1)
    run(model, batches, Looks())
    assert seen == [pytest.approx(1)]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"fit": -1}, r"d3: fit must be a number >= 0, got -1; the default is 0.5"),
        ({"slack": float("nan")}, r"d3: slack must be a number >= 0, got nan; the default is 0.1"),
        ({"fit": True}, r"d3: fit must be a number >= 0, got True"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("d3", **settings)
