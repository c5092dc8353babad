"""anp: masks are learnt under adversarial noise, and prune what clean accuracy allows."""

import copy

import pytest
import torch
from method_cases import SEED, problem, run
from purify_cases import make_batches, make_model, quick
from torch import nn
from torch.nn import functional as F

from fst_fast import methods
from fst_fast.methods.channel_masks import ChannelMasks

STEPS = 30
NOISE, SHARE, MASK_LR = 0.4, 0.2, 0.2


def loss_with(model, images, labels, factors):
    """The loss of a copy in train mode whose batch norms have their parameters times factors."""
    parameters = dict(copy.deepcopy(model).train().named_parameters())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    at = 0
    for name in ("bn1", "bn2"):
        count = len(parameters[f"{name}.weight"])
        for kind, factor in zip(("weight", "bias"), factors, strict=True):
            own = parameters[f"{name}.{kind}"].detach()
            parameters[f"{name}.{kind}"] = own * factor[at : at + count]
        at += count
    output = torch.func.functional_call(model, parameters | buffers, images)
    return F.cross_entropy(output, labels)


def transcribe(model, batches, noise):
    """The published algorithm in one straight line; returns the losses and the masks."""
    torch.manual_seed(SEED)
    model = copy.deepcopy(model).train()
    mask = torch.ones(16, dtype=torch.float64)
    velocity, losses = torch.zeros_like(mask), []
    for images, labels in batches:
        delta, xi = (noise * (2 * torch.rand(16, dtype=torch.float64) - 1) for _ in range(2))
        delta.requires_grad_()
        xi.requires_grad_()
        loss = loss_with(model, images, labels, (mask + delta, 1 + xi))
        steps = torch.autograd.grad(loss, (delta, xi))
        delta, xi = (
            (d.detach() + noise * s.sign()).clamp(-noise, noise)
            for d, s in zip((delta, xi), steps, strict=True)
        )
        mask.requires_grad_()
        robust = loss_with(model, images, labels, (mask + delta, 1 + xi))
        natural = loss_with(model, images, labels, (mask, torch.ones_like(mask)))
        loss = SHARE * natural + (1 - SHARE) * robust
        (gradient,) = torch.autograd.grad(loss, mask)
        velocity = 0.9 * velocity + gradient
        mask = (mask.detach() - MASK_LR * velocity).clamp(0, 1)
        losses.append(natural.item())
    return losses, mask


def kept_masks(method):
    """The method, and the list that gets its masks before they prune."""
    seen = []

    class Keeps(type(method)):
        def finish(self, run):
            seen.append(run.memo["masks"].mask.clone())
            super().finish(run)

    return Keeps(**{k: v for k, v in method.settings().items() if k != "method"}), seen


@pytest.mark.parametrize("noise", [NOISE, 0.1])
def test_the_masks_follow_the_transcription(noise):
    model, batches = problem(STEPS)
    method, seen = kept_masks(methods.get("anp", noise=noise))
    result = run(model, batches, method)
    losses, mask = transcribe(model, batches, noise)
    got = [record.loss for record in result.history]
    assert got == pytest.approx(losses, rel=1e-10)
    torch.testing.assert_close(seen[0], mask, rtol=1e-10, atol=1e-12)
    assert 0 <= mask.min() < 0.9


def test_only_weights_of_pruned_channels_change():
    model, batches = problem(STEPS)
    method, seen = kept_masks(methods.get("anp", most_lost=1.0))
    result = run(model, batches, method)
    before, after = model.state_dict(), result.model.state_dict()
    pruned = torch.cat([after["bn1.weight"], after["bn2.weight"]]) == 0
    assert torch.equal(pruned, seen[0] < 0.95)
    assert pruned.any()
    for key, value in before.items():
        same = value == after[key]
        expected = after[key] != 0 if key in ("bn1.weight", "bn2.weight") else True
        assert (same == expected).all(), key


class Counting:
    """A run in which each pruned channel costs a tenth of accuracy."""

    def __init__(self, norm):
        self.norm, self.asked = norm, 0

    def clean_accuracy(self):
        self.asked += 1
        return 0.9 - 0.1 * (self.norm.weight == 0).sum().item()


@pytest.mark.parametrize(("most_lost", "pruned"), [(0.0, 0), (0.15, 1), (0.35, 3), (1.0, 4)])
def test_pruning_goes_as_far_as_the_accuracy_allows(most_lost, pruned):
    norm = nn.BatchNorm2d(5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    masks = ChannelMasks([norm])
    masks.mask.copy_(torch.tensor([0.5, 0.1, 1.0, 0.7, 0.3]))
    run = Counting(norm)
    masks.prune(run, most_lost)
    order = [1, 4, 0, 3]
    expected = before["weight"].clone()
    expected[order[:pruned]] = 0
    assert torch.equal(norm.weight, expected)
    assert torch.equal(norm.bias, before["bias"])
    assert run.asked <= 6, "no threshold that prunes the same is measured again"


def test_validation_images_choose_the_threshold():
    """Pruning loses nothing where every answer is wrong, and all small masks go."""
    images = make_batches(1)[0][0]
    method, seen = kept_masks(methods.get("anp", most_lost=0.0, lr=5.0))
    model = make_model()
    wrong = (model.eval()(images).argmax(1) + 1) % 4
    result = quick(model, make_batches(), method=method, validation=[(images, wrong)])
    assert result.settings["validation"]
    # Pruning may only make more of these answers right.
    gone = result.model[1].weight == 0
    assert torch.equal(gone, seen[0] < 0.95)
    assert gone.any()


def test_a_model_without_batch_norm_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ValueError, match=r"anp: model must have batch norm .*; use d3, ft_sam"):
        quick(model, make_batches(), method="anp")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"noise": -1}, r"anp: noise must be a number >= 0, got -1; the default is 0.4"),
        ({"share": 2}, r"anp: share must be a number in 0..1, got 2"),
        ({"lr": None}, r"anp: lr must be a number >= 0, got None"),
        ({"most_lost": 5}, r"anp: most_lost must be a number in 0..1, got 5"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("anp", **settings)
