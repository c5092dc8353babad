"""sau: changes that fool the suspect and the tuned model alike are unlearnt."""

import copy
import math

import pytest
import torch
from method_cases import Descent, assert_follows, problem, run
from purify_cases import make_batches, make_model, quick
from torch.nn import functional as F

from fst_fast import methods
from fst_fast.methods.sau import divergence, log_of_others

STEPS = 12


def probabilities(model, images):
    return torch.softmax(model(images), 1)


def transcribe(model, batches, radius, steps, adversarial, shared):
    """The published algorithm in one straight line; also how many images were changed in vain."""
    suspect = copy.deepcopy(model).eval()
    model = copy.deepcopy(model)
    low, high = (
        extreme(batches[0][0], (0, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax)
    )
    descent, losses, shares = Descent(model, len(batches)), [], []
    for images, labels in batches:
        model.eval()
        change = torch.zeros_like(images)
        reach = (radius * (high - low)).expand_as(images)
        for _ in range(steps):
            change.requires_grad_()
            shown = torch.minimum(torch.maximum(images + change, low), high)
            p, q = probabilities(model, shown), probabilities(suspect, shown)
            m = (p + q) / 2
            js = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean() / 2
            score = adversarial * F.nll_loss(p.log(), labels) - js
            (gradient,) = torch.autograd.grad(score, change)
            change = change.detach()
            for row in range(len(labels)):
                alike = p[row].argmax() == q[row].argmax() != labels[row]
                if not alike:
                    moved = change[row] + reach[row] * gradient[row].sign()
                    change[row] = torch.minimum(torch.maximum(moved, -reach[row]), reach[row])
        shown = torch.minimum(torch.maximum(images + change, low), high)
        answers = suspect(shown).argmax(1)
        model.train()
        p = probabilities(model, torch.cat([images, shown]))
        unlearnt = torch.zeros((), dtype=torch.float64)
        for row, answer in enumerate(answers):
            if answer != labels[row]:
                unlearnt = unlearnt - (1 - p[len(labels) + row, answer]).log() / len(labels)
        loss = F.nll_loss(p[: len(labels)].log(), labels) + shared * unlearnt
        descent.step(torch.autograd.grad(loss, list(model.parameters())))
        losses.append(loss.item())
        shares.append((answers != labels).double().mean().item())
    return losses, model, shares


@pytest.mark.parametrize(
    "settings",
    [
        {"radius": 0.2, "steps": 5, "adversarial": 0.01, "shared": 1.0},
        {"radius": 0.05, "steps": 3, "adversarial": 1.0, "shared": 0.3},
    ],
)
def test_it_follows_the_transcription(settings):
    model, batches = problem(STEPS)
    result = run(model, batches, methods.get("sau", **settings))
    losses, truth, shares = transcribe(model, batches, **settings)
    assert_follows(result, losses, truth)
    assert max(shares) > 0.5


def test_without_its_term_it_is_plain_tuning_on_the_statistics_of_both():
    model, batches = problem(1)
    result = run(model, batches, methods.get("sau", shared=0.0, radius=0.0))
    # The pixels' range comes from this very batch, so that unchanged images stay.
    doubled = [(torch.cat([images, images]), torch.cat([y, y])) for images, y in batches]
    plain = run(model, doubled, methods.get("ft"))
    for one, other in zip(result.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_the_logarithm_is_exact_where_an_answer_is_sure():
    logits = torch.tensor([[90.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    got = log_of_others(logits.requires_grad_(), torch.tensor([0, 2]))
    assert got[0].item() == pytest.approx(math.log(2) - 90)
    p = math.exp(3) / (math.exp(1) + math.exp(2) + math.exp(3))
    assert got[1].item() == pytest.approx(math.log(1 - p))
    got.sum().backward()
    assert logits.grad.isfinite().all()


def test_the_divergence_is_zero_of_equal_answers_and_log_2_of_opposite_ones():
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], dtype=torch.float64)
    assert divergence(logits, logits + 3).item() == pytest.approx(0, abs=1e-12)
    assert divergence(logits, logits.flip(1)).item() == pytest.approx(math.log(2))


def test_the_model_ends_with_its_own_flags():
    model = make_model()
    result = quick(model, make_batches(), method="sau", inplace=True)
    assert result.model is model
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"radius": 2}, r"sau: radius must be a number in 0..1, got 2; the default is 0.2"),
        ({"steps": 0}, r"sau: steps must be an integer >= 1, got 0; the default is 5"),
        ({"steps": 2.0}, r"sau: steps must be an integer >= 1, got 2.0"),
        ({"shared": -1}, r"sau: shared must be a number >= 0, got -1"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("sau", **settings)
