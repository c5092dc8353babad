"""ssft: the shortcut that a backdoor goes by is found, suppressed in weights, and done without."""

import copy
import math

import pytest
import torch
from method_cases import CLASSES, SEED, Descent, assert_follows, problem, run
from purify_cases import make_batches, make_model, quick
from torch import nn
from torch.nn import functional as F

import fst_fast
from fst_fast import methods
from fst_fast.lab import models
from fst_fast.methods.shortcuts import find_shortcuts, successes
from fst_fast.methods.ssft import steepest, with_trigger

STEPS = 25


class TwoStages(nn.Module):
    """Smooth, with two projected shortcuts and an identity; the names tell nothing."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b, self.c = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.d = nn.Conv2d(6, 6, 1)
        self.e, self.f = nn.Conv2d(6, 8, 3, 2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.g, self.h = nn.Conv2d(6, 8, 1, 2), nn.BatchNorm2d(8)
        self.i, self.j = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.classify = nn.Linear(8, CLASSES)

    def forward(self, x, factors=(1.0, 1.0)):
        x = F.silu(self.a(x))
        short = self.d(x) if factors[0] == 1 else factors[0] * self.d(x)
        x = F.silu(self.c(self.b(F.silu(x) + 0.1)) + short)
        short = self.h(self.g(x))
        short = short if factors[1] == 1 else factors[1] * short
        x = F.silu(torch.add(short, self.f(F.silu(self.e(x)))))
        # Equally long branches are no shortcut; the identity has no weight.
        x = x + (self.i(x) + self.j(x))
        return self.classify(x.mean((2, 3)))


def suspect():
    torch.manual_seed(4)
    model = TwoStages().double()
    with torch.no_grad():
        for norm in (model.c, model.h):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
        model.classify.weight.mul_(3)
    return model


def undecided(images):
    """The suspect, whose answers to triggered images depend on its shortcuts."""
    model = suspect()
    with torch.no_grad():
        model.classify.bias.sub_(model.eval()(images).mean(0))
    return model


def names(model, parameters):
    known = {id(p): name for name, p in model.named_parameters()}
    return [known[id(p)] for p in parameters]


def test_shortcuts_are_found_by_what_is_computed():
    model = suspect()
    found = find_shortcuts(model.eval(), torch.zeros(2, 3, 8, 8).double())
    ends = [names(model, one.end) for one in found]
    assert ends == [["d.weight", "d.bias"], ["h.weight", "h.bias"], []]
    layers = [sorted({name[0] for name in names(model, one.stage)}) for one in found]
    assert layers == [list("abcd"), list("efghij"), list("efghij")]


def test_shortcuts_of_known_networks():
    torch.manual_seed(0)
    images = torch.zeros(2, 3, 32, 32)
    for make in (models.resnet18, models.preactresnet18):
        found = find_shortcuts(make(width=4).eval(), images)
        assert [bool(one.end) for one in found] == [False, False, *[True, False] * 3]
    torchvision = pytest.importorskip("torchvision")
    block = torchvision.models.resnet.Bottleneck
    # ResNet-50, but narrow.
    model = torchvision.models.ResNet(block, [3, 4, 6, 3], num_classes=3, width_per_group=4)
    found = find_shortcuts(model.eval(), images)
    assert [number for number, one in enumerate(found) if one.end] == [0, 3, 7, 13]
    assert len(found) == 16
    assert find_shortcuts(models.vgg19_bn(width=4).eval(), images) == []


class Counts(nn.Module):
    """Its projection serves twice, or is written into."""

    def __init__(self, twice):
        super().__init__()
        self.twice = twice
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        main, short = self.two(self.one(x)), self.three(x)
        if self.twice:
            return main + short + short.mean()
        main += short
        return main


def test_a_layer_that_serves_twice_cannot_be_scaled():
    images = torch.zeros(2, 3, 4, 4)
    for twice in (True, False):
        (found,) = find_shortcuts(Counts(twice).eval(), images)[:1]
        assert bool(found.end) is not twice


def transcribe(model, batches, shortcut, kept):
    """Suppressed by a factor in the forward pass, the stage alone tuned, in one straight line."""
    model = copy.deepcopy(model).train()
    factors = [kept if shortcut == number else 1.0 for number in (0, 1)]
    tuned = ("a", "b", "c") if shortcut == 0 else ("e", "f", "g", "i", "j")
    stage = [p for name, p in model.named_parameters() if name.partition(".")[0] in tuned]
    descent, losses = Descent(model, len(batches)), []
    descent.parameters, descent.velocity = stage, [torch.zeros_like(p) for p in stage]
    for images, labels in batches:
        loss = F.cross_entropy(model(images, factors), labels)
        descent.step(torch.autograd.grad(loss, stage))
        losses.append(loss.item())
    with torch.no_grad():
        for layer in (model.d, model.h)[shortcut : shortcut + 1]:
            layer.weight.mul_(kept)
            layer.bias.mul_(kept)
    return losses, model


@pytest.mark.parametrize(("shortcut", "kept"), [(0, 0.0), (1, 0.0), (1, 0.4)])
def test_it_follows_the_transcription(shortcut, kept):
    model, batches = suspect(), problem(STEPS)[1]
    method = methods.get("ssft", shortcut=shortcut, kept=kept)
    result = run(model, batches, method)
    losses, truth = transcribe(model, batches, shortcut, kept)
    assert_follows(result, losses, truth)
    assert [type(m) for m in result.model.modules()] == [type(m) for m in model.modules()]
    assert all(p.requires_grad for p in result.model.parameters())


def scanned(model, triggered, target):
    """The scores of both shortcuts, by factors in the forward pass."""
    scores = []
    for shortcut in (0, 1):
        rates = []
        for step in range(11):
            factors = [step / 10 if shortcut == number else 1.0 for number in (0, 1)]
            answers = model.eval()(triggered, factors).argmax(1)
            rates.append((answers == target).double().mean().item())
        pairs = [(rates[i] - rates[i - 1]) / math.exp(rates[i - 1]) for i in range(1, 11)]
        scores.append(max(pairs))
    return scores


def chosen(model, batches, method):
    """The number of the shortcut that a run chose, and the model of its probe."""
    seen = []

    class Looks(type(method)):
        def finish(self, run):
            seen.append((run.memo["chosen"].item(), run.memo["probe"].model))

    settings = {k: v for k, v in method.settings().items() if k != "method"}
    run(model, batches, Looks(**settings))
    return seen[0]


def paste(images, low, high):
    triggered = images.clone()
    triggered[:, :, -3:, -3:] = high.expand(1, 3, 3, 3)
    # As bytes, the pixels are rounded.
    span = high - low
    return ((triggered - low) / span * 255).round() / 255 * span + low


def extremes(images):
    return (f(images, (0, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))


@pytest.mark.parametrize("target", [0, 2, 3])
def test_with_a_trigger_the_choice_is_that_of_a_scan_of_the_suspect(target):
    images, labels = problem(1, 60)[1][0]
    shown = paste(images, *extremes(images))
    model, triggered = undecided(shown), shown[labels != target]
    scores = scanned(model, triggered, target)
    assert scores[0] != scores[1]
    method = methods.get("ssft", trigger="badnets", target=target)
    number, _ = chosen(model, [(images, labels)], method)
    assert number == scores.index(max(scores))


def test_without_a_trigger_a_copy_learns_the_probe():
    images, labels = problem(1, 60)[1][0]
    triggered = paste(images, *extremes(images))
    model = undecided(triggered)
    method = methods.get("ssft", probe_steps=20, target=1)
    number, copied = chosen(model, [(images, labels)], method)
    torch.manual_seed(SEED)
    truth = copy.deepcopy(model).train()
    velocity = [torch.zeros_like(p) for p in truth.parameters()]
    for _ in range(20):
        rows = torch.randint(60, (60,))
        shown = torch.cat([triggered[rows[:15]], images[rows[15:]]])
        answers = torch.cat([torch.ones(15, dtype=torch.int64), labels[rows[15:]]])
        loss = F.cross_entropy(truth(shown), answers)
        gradients = torch.autograd.grad(loss, list(truth.parameters()))
        with torch.no_grad():
            for p, v, g in zip(truth.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(0.01 * v)
    for one, other in zip(copied.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    scores = scanned(truth, triggered[labels != 1], 1)
    assert number == scores.index(max(scores))


def test_the_score_is_the_steepest_rise_from_little_success():
    assert steepest([0.2, 0.2, 0.5]) == pytest.approx(0.3 / math.exp(0.2))
    assert steepest([0.9, 0.6, 0.6]) == 0


def test_a_scan_puts_the_shortcut_back():
    layer = nn.Linear(2, 2)
    before = layer.weight.clone(), layer.bias.clone()
    found = successes([layer.weight, layer.bias], [0, 0.5], lambda: layer.weight[0, 0].item())
    assert found == [0, 0.5 * before[0][0, 0].item()]
    assert torch.equal(layer.weight, before[0])
    assert torch.equal(layer.bias, before[1])


def test_a_trigger_is_put_on_bytes():
    pixels = torch.randint(0, 256, (3, 6, 6, 3)).to(torch.uint8)
    low, high = torch.full((1, 3, 1, 1), -2.0), torch.full((1, 3, 1, 1), 3.0)
    attack = fst_fast.triggers.BadNets(size=2)
    got = with_trigger(pixels.permute(0, 3, 1, 2) / 255 * 5 - 2, low, high, attack)
    torch.testing.assert_close(got, attack.apply(pixels).permute(0, 3, 1, 2) / 255 * 5 - 2)


def test_a_model_whose_shortcuts_cannot_be_suppressed_is_refused():
    model, batches = problem(1)
    with pytest.raises(ValueError, match=r"must have a residual shortcut .* got 1, all of them id"):
        run(model, batches, "ssft")
    with pytest.raises(ValueError, match=r"got none in Sequential; use d3, ft_sam"):
        quick(make_model(), make_batches(), method="ssft")
    with pytest.raises(ValueError, match=r"shortcut must be a number in 0..1, got 2; the model h"):
        run(suspect(), batches, methods.get("ssft", shortcut=2))
    with pytest.raises(ValueError, match=r"target must be a class of the model, 0 to 4, got 5"):
        run(suspect(), batches, methods.get("ssft", target=5))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kept": 2}, r"ssft: kept must be a number in 0..1, got 2; the default is 0.0"),
        ({"shortcut": -1}, r"ssft: shortcut must be an integer >= 0, got -1"),
        ({"trigger": "unknown"}, r"triggers: name must be one of"),
        ({"trigger": "badnets", "trigger_options": {"colour": 1}}, r"badnets does not take"),
        ({"trigger_options": {"size": 1}}, r"ssft: trigger must be given with its trigger_options"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("ssft", **settings)
