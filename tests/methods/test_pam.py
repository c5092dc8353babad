"""pam: the gradient of a step is that on the way back to the suspect."""

import copy

import pytest
import torch
from method_cases import Descent, assert_follows, problem, run
from purify_cases import assert_same_run, make_batches, make_model, quick
from torch.nn import functional as F

from fst_fast import methods
from fst_fast.methods.kept import KeptTensors
from fst_fast.methods.pam import move_towards
from fst_fast.tuning import step

STEPS = 40


def transcribe(model, batches, rho):
    """The published algorithm in one straight line."""
    suspect = [p.detach().clone() for p in model.parameters()]
    model = copy.deepcopy(model).train()
    descent, losses = Descent(model, len(batches)), []
    for number, (images, labels) in enumerate(batches):
        here = [p.detach().clone() for p in model.parameters()]
        way = [s - w for s, w in zip(suspect, here, strict=True)]
        length = sum((d**2).sum() for d in way).sqrt()
        with torch.no_grad():
            for p, d in zip(model.parameters(), way, strict=True):
                if number:
                    p.add_(rho * d / length)
        loss = F.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.item())
        with torch.no_grad():
            for p, w in zip(model.parameters(), here, strict=True):
                p.copy_(w)
        descent.step(gradients)
    return losses, model


def test_it_follows_the_transcription():
    model, batches = problem(STEPS)
    result = run(model, batches, methods.get("pam", rho=0.5))
    assert_follows(result, *transcribe(model, batches, 0.5))
    plain = run(model, batches, methods.get("ft"))
    apart = result.model.classify.weight - plain.model.classify.weight
    assert apart.abs().max() > 1e-2


def test_no_way_back_is_plain_tuning_to_the_bit():
    runs = [
        quick(make_model(), make_batches(), method=method)
        for method in (methods.get("pam", rho=0.0), methods.get("ft"))
    ]
    assert_same_run(*runs)


def test_a_deferred_projection_is_no_other_way(monkeypatch):
    method = methods.get("pam", project=True)
    whole = quick(make_model(), make_batches(), method=method)
    monkeypatch.setattr(step, "DEFERRED_FROM", 1)
    deferred = quick(make_model(), make_batches(), method=method)
    for one, other in zip(whole.model.parameters(), deferred.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_searched_triggers_are_shown_as_the_default_shows_them():
    """Without a way back, the rest is trigger_unlearning."""
    ours = quick(make_model(), make_batches(), method=methods.get("pam", rho=0.0, inverted=0.5))
    theirs = quick(
        make_model(), make_batches(), method=methods.get("trigger_unlearning", found=0.5), epochs=1
    )
    assert len(ours.findings) == len(theirs.findings) > 0
    first, second = ours.history[0], theirs.history[0]
    assert (first.loss, first.clean_accuracy) == (second.loss, second.clean_accuracy)
    assert first.loss != quick(make_model(), make_batches(), method="ft").history[0].loss


def test_the_way_is_of_the_length_that_was_asked_for():
    weights, goal = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), 2 * torch.ones(3)]
    move_towards(weights, goal, 0.7)
    assert torch.cat(weights).norm().item() == pytest.approx(0.7)
    for weight, end in zip(weights, goal, strict=True):
        torch.testing.assert_close(weight / weight.max(), end / end.max())
    move_towards(goal, [g.clone() for g in goal], 0.7)
    assert goal[0].tolist() == [1, 1], "who is there stays"


def test_an_error_within_leaves_the_tensors_as_they_were():
    tensors = [torch.ones(3), torch.tensor(2), torch.zeros(2, dtype=torch.float64)]

    def fails():
        with KeptTensors(tensors).unchanged():
            torch._foreach_add_(tensors, 1)
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        fails()
    assert [tensor.flatten()[0].item() for tensor in tensors] == [1, 2, 0]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rho": float("inf")}, r"pam: rho must be a number >= 0, got inf; the default is 0.5"),
        ({"inverted": 2}, r"pam: inverted must be a number in 0..1, got 2; the default is 0.0"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("pam", **settings)
