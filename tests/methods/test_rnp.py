"""rnp: a copy forgets the clean images, masks relearn them, and the suspect is pruned by these."""

import copy

import pytest
import torch
from method_cases import SEED, forget, problem, run
from purify_cases import make_batches, quick
from torch import nn
from torch.nn import functional as F

from fst_fast import methods
from fst_fast.methods import ascent

STEPS, SIZE = 12, 12


def relearn(model, batches, weight, lr):
    """The masks in one straight line, and the losses."""
    norms = (model.bn1, model.bn2)
    originals = [norm.weight.detach().clone() for norm in norms]
    mask = torch.ones(16, dtype=torch.float64)
    velocity, losses = torch.zeros_like(mask), []
    for images, labels in batches:
        mask.requires_grad_()
        parameters = dict(model.named_parameters())
        for name, own, part in zip(("bn1", "bn2"), originals, mask.chunk(2), strict=True):
            parameters[f"{name}.weight"] = own * part
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        output = torch.func.functional_call(model, parameters | buffers, images)
        loss = weight * F.cross_entropy(output, labels)
        (gradient,) = torch.autograd.grad(loss, mask)
        velocity = 0.9 * velocity + gradient
        mask = (mask.detach() - lr * velocity).clamp(0, 1)
        losses.append(loss.item())
    return mask, losses


@pytest.mark.parametrize(("unlearn_lr", "forgotten"), [(0.05, 0.2), (0.3, 0.0)])
def test_it_follows_the_transcription(unlearn_lr, forgotten):
    model, batches = problem(STEPS, SIZE)
    # The suspect answers its first batch rightly, so that there is something to forget.
    answers = copy.deepcopy(model).train()(batches[0][0]).argmax(1)
    batches[0] = (batches[0][0], answers)
    settings = {"unlearn_lr": unlearn_lr, "forgotten": forgotten, "passes": 15}
    seen = []

    class Looks(methods.METHODS["rnp"]):
        def finish(self, run):
            seen.append((run.memo["masks"].mask.clone(), run.memo["ascent"].model))
            super().finish(run)

    result = run(model, batches, Looks(**settings, most_lost=1.0))
    torch.manual_seed(SEED)
    forgetful, accuracies = forget(model, *batches[0], unlearn_lr, forgotten, 15)
    mask, losses = relearn(copy.deepcopy(forgetful), batches, 0.2, 0.2)
    assert [r.loss for r in result.history] == pytest.approx(losses, rel=1e-9)
    torch.testing.assert_close(seen[0][0], mask, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(seen[0][1].conv1.weight, forgetful.conv1.weight)
    assert accuracies[0] > 0.5 > accuracies[-1]
    # Only the weights of pruned channels differ from the suspect's.
    before, after = model.state_dict(), result.model.state_dict()
    pruned = torch.cat([after["bn1.weight"], after["bn2.weight"]]) == 0
    assert torch.equal(pruned, mask < 0.95)
    for key, value in before.items():
        same = value == after[key]
        expected = after[key] != 0 if key in ("bn1.weight", "bn2.weight") else True
        assert (same == expected).all(), key


def test_gradients_of_the_ascent_are_clipped(monkeypatch):
    model, batches = problem(1, SIZE)
    ends = []
    for most in (1e-3, 1e-6):
        monkeypatch.setattr(ascent, "_MOST_NORM", most)

        class Looks(methods.METHODS["rnp"]):
            def finish(self, run):
                moved = run.memo["ascent"].model.conv1.weight - run.model.conv1.weight
                ends.append(moved.norm().item())

        run(model, batches, Looks(passes=1, unlearn_lr=1.0))
    assert 0 < ends[0] <= 1e-3
    assert ends[1] == pytest.approx(ends[0] / 1000, rel=1e-3)


def test_it_stops_as_soon_as_the_images_are_forgotten():
    model, batches = problem(1, SIZE)
    moved = []

    class Looks(methods.METHODS["rnp"]):
        def finish(self, run):
            moved.append((run.memo["ascent"].model.conv1.weight - run.model.conv1.weight).norm())

    for settings in ({"forgotten": 1.0}, {"passes": 1, "forgotten": 0.0}, {"passes": 0}):
        run(model, batches, Looks(**settings))
    assert moved[0] == moved[1] > 0
    assert moved[2] == 0


def test_a_model_without_batch_norm_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ValueError, match=r"rnp: model must have batch norm .*; use d3, ft_sam"):
        quick(model, make_batches(), method="rnp")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"images": 0}, r"rnp: images must be an integer >= 1, got 0; the default is 500"),
        ({"forgotten": 1.2}, r"rnp: forgotten must be a number in 0..1, got 1.2"),
        ({"unlearn_lr": -1}, r"rnp: unlearn_lr must be a number >= 0, got -1"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("rnp", **settings)
