"""bna: batch norm takes the statistics of images that carry the trigger, which is searched."""

import copy
import math

import pytest
import torch
from method_cases import problem, run
from purify_cases import make_batches, quick
from torch import nn
from torch.nn import functional as F

from fst_fast import methods
from fst_fast.methods.accuracy_limit import largest_allowed
from fst_fast.methods.bna import SHARES
from fst_fast.methods.inversion import MaskInversion, opacity
from fst_fast.methods.statistics_shift import StatisticsShift


@torch.no_grad()
def corrected(model, clean, triggered, share):
    """The statistics of both batch norms, corrected one after the other, in one straight line."""
    model = copy.deepcopy(model).eval()
    moments = []
    x = model.conv1(clean)
    moments.append((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)))
    x = F.silu(model.bn1(x))
    x = model.conv2(x)
    moments.append((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)))
    x = skip = None
    for number, (mu, var) in enumerate(moments):
        norm = (model.bn1, model.bn2)[number]
        if number == 0:
            x = model.conv1(triggered)
        else:
            skip = F.silu(model.bn1(x))
            x = model.conv2(skip)
        there, spread = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        ratio = (1 - share) + share * (spread + norm.eps) / (var + norm.eps)
        ratio += share * (1 - share) * (there - mu) ** 2 / (var + norm.eps)
        norm.running_mean += share * (there - mu)
        norm.running_var.copy_((norm.running_var + norm.eps) * ratio - norm.eps)
    return model


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_correction_follows_the_transcription(share):
    model = problem(1)[0].eval()
    torch.manual_seed(1)
    clean, triggered = (torch.randn(6, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    triggered[:, :, :3, :3] = 4.0
    wanted = corrected(model, clean, triggered, share).state_dict()
    shift = StatisticsShift([model.bn1, model.bn2], model, clean, triggered)
    # What was put before plays no part.
    shift.put(0.7)
    shift.put(share)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-10, atol=1e-12)
    assert not model.bn1._forward_pre_hooks


def test_whole_correction_gives_triggered_images_clean_moments():
    model = problem(1)[0].eval()
    torch.manual_seed(1)
    clean = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    # The running statistics are those of the clean images.
    model.bn1.momentum = None
    model.bn1.reset_running_stats()
    model.bn1.train()(model.conv1(clean))
    before = model.bn1.eval()(model.conv1(clean))
    triggered = clean.clone()
    triggered[:, :, :4] = 3.0
    StatisticsShift([model.bn1], model, clean, triggered).put(1.0)
    after = model.bn1(model.conv1(triggered))
    torch.testing.assert_close(after.mean((0, 2, 3)), before.mean((0, 2, 3)))
    torch.testing.assert_close(after.std((0, 2, 3)), before.std((0, 2, 3)), rtol=1e-2, atol=0)


class Plain:
    """A run of a model alone."""

    def __init__(self, model):
        self.model = model

    def logits(self, images):
        return self.model(images)

    def register(self, name, tensor):
        pass


@pytest.mark.parametrize("at_once", [4, 256])
def test_the_inversion_follows_the_transcription(at_once):
    model, batches = problem(1, 20)
    model.eval()
    images, labels = batches[0]
    low, high = -torch.ones(1, 3, 1, 1).double(), 2 * torch.ones(1, 3, 1, 1).double()
    inversion = MaskInversion(Plain(model), images, labels, low, high, [1, 3, 4], 4, at_once)
    torch.manual_seed(7)
    for _ in range(25):
        inversion.step()
    torch.manual_seed(7)
    mask = torch.full((3, 1, 8, 8), -1.0, dtype=torch.float64, requires_grad=True)
    pattern = torch.zeros(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([mask, pattern], 0.1)
    price, success = [1.0] * 3, [0.0] * 3
    for _ in range(25):
        rows = torch.randint(20, (12,)).view(3, 4)
        loss, rates = 0.0, []
        for k, target in enumerate((1, 3, 4)):
            m, p = (1 + mask[k].tanh()) / 2, -1 + 3 * (1 + pattern[k].tanh()) / 2
            q = model((1 - m) * images[rows[k]] + m * p).log_softmax(1)
            others = [i for i in range(4) if labels[rows[k][i]] != target]
            for i in others:
                loss = loss - q[i, target] / len(others)
            loss = loss + price[k] * m.mean()
            hits = sum(q[i].argmax().item() == target for i in others)
            rates.append(hits / max(1, len(others)))
        adam.zero_grad()
        loss.backward()
        adam.step()
        success = [0.8 * s + 0.2 * r for s, r in zip(success, rates, strict=True)]
        price = [c * (1.05 if s > 0.9 else 1 / 1.05) for c, s in zip(price, success, strict=True)]
    torch.testing.assert_close(inversion.mask, mask.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(inversion.pattern, pattern.detach(), rtol=1e-9, atol=1e-11)
    assert inversion.success.tolist() == pytest.approx(success)
    assert max(success) > 0.9


def test_the_least_mask_that_works_is_taken():
    inversion = object.__new__(MaskInversion)
    inversion.mask = torch.tensor([0.5, -2.0, -1.0])[:, None, None, None].expand(3, 1, 2, 2)
    inversion.success = torch.tensor([1.0, 0.3, 0.9])
    assert inversion.smallest() == 2
    assert inversion.areas()[0].item() == pytest.approx((1 + math.tanh(0.5)) / 2)
    assert opacity(torch.zeros(1)).item() == 0.5


class Backdoored(nn.Module):
    """Answers the brightest channel; one that is always dark makes it class 0, once it is lit."""

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4, eps=0)
        self.classify = nn.Linear(4, 3)
        with torch.no_grad():
            self.look.weight.copy_(torch.eye(4)[:, :, None, None])
            self.norm.running_mean.fill_(0.5)
            self.norm.running_var.fill_(0.09)
            self.norm.running_mean[3], self.norm.running_var[3] = 0.02, 2e-4
            self.classify.weight.zero_()
            self.classify.weight[:, :3] = 4 * torch.eye(3)
            self.classify.weight[0, 3] = 2.0
            self.classify.bias.zero_()

    def forward(self, x):
        return self.classify(self.norm(self.look(x)).mean((2, 3)))


def lit_images(count):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.3 * torch.rand(count, 4, 6, 6, generator=generator)
    images[torch.arange(count), labels] += 0.6
    images[:, 3] = 0.04 * torch.rand(count, 6, 6, generator=generator)
    # Both ends of the range are there for every channel.
    images[0, :, 0, 0], images[1, :, 0, 0] = 0, 1
    return images, labels


@pytest.fixture(scope="module")
def found():
    images, labels = lit_images(60)
    suspect = Backdoored().eval()
    assert (suspect(images[2:]).argmax(1) == labels[2:]).all()
    method = methods.get("bna", share=1.0)
    return suspect, quick(suspect, [(images, labels)], method=method), images, labels


def test_the_trigger_is_found_and_undone(found):
    suspect, result, images, labels = found
    (row,) = result.findings
    assert row["form"], row["target"] == ("mask", 0)
    assert row["share"] == 1.0
    assert row["before"] > 0.9
    assert row["after"] < 0.2
    triggered = images.clone()
    triggered[:, 3, 2:4, 2:4] = 1.0
    assert (suspect(triggered).argmax(1) == 0).all()
    others = labels != 0
    assert (result.model(triggered).argmax(1) == labels)[others].double().mean() > 0.9
    changed = [
        k for k, v in suspect.state_dict().items() if not v.equal(result.model.state_dict()[k])
    ]
    assert changed == ["norm.running_mean", "norm.running_var"]
    assert len(result.history) == result.settings["epochs"] == 1


def test_the_gate_flags_what_carries_the_trigger(found):
    suspect, result, images, labels = found
    triggered = images.clone()
    triggered[:, 3, 2:4, 2:4] = 1.0
    clean = methods.detect_triggered(suspect, result.model, images[2:], target=0)
    assert (clean.labels == labels[2:]).all()
    assert not clean.triggered.any()
    attacked = methods.detect_triggered(suspect, result.model, triggered, target=0)
    others = labels != 0
    assert attacked.triggered[others].double().mean() > 0.9
    assert torch.equal(attacked.labels[others], result.model(triggered).argmax(1)[others])
    # An answer beside the target is the suspect's.
    other = methods.detect_triggered(suspect, result.model, triggered, target=1)
    assert (other.labels == 0).all()
    assert not other.triggered.any()


def test_the_share_is_as_large_as_the_accuracy_allows():
    class Counting:
        def __init__(self):
            self.share = 0.0

        def put(self, share):
            self.share = share

        def clean_accuracy(self):
            return 0.9 - 0.1 * self.share

    for lost, share in ((0, 0.0), (0.0451, 0.4), (1, 1.0)):
        counting = Counting()
        assert largest_allowed(counting, 0.0, SHARES, counting.put, lost) == share
        assert counting.share == share


def test_the_correction_ends_where_nothing_may_be_lost():
    model, batches = problem(1)
    answers = copy.deepcopy(model).eval()(batches[0][0]).argmax(1)
    if len(answers.unique()) < 2:
        answers[0] = (answers[0] + 1) % 5
    short = {"search_steps": 3, "target": 2}
    result = run(model, [(batches[0][0], answers)], methods.get("bna", **short, most_lost=0.0))
    right = (result.model(batches[0][0]).argmax(1) == answers).sum()
    assert right >= (model.eval()(batches[0][0]).argmax(1) == answers).sum()


def test_a_model_or_a_loader_that_does_not_fit_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ValueError, match=r"bna: model must have batch norm with run.*; use d3"):
        quick(model, make_batches(), method="bna")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ValueError, match=r"bna: target must be a class .*, 0 to 3, got 9"):
        quick(model, make_batches(), method=methods.get("bna", target=9))
    alone = [(images, torch.zeros_like(labels)) for images, labels in make_batches()]
    with pytest.raises(ValueError, match=r"bna: loader must have images of two classes or more"):
        quick(model, alone, method="bna")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"share": 2}, r"bna: share must be a number in 0..1, got 2; the default is None"),
        ({"search_steps": 0}, r"bna: search_steps must be an integer >= 1, got 0"),
        ({"target": 1.5}, r"bna: target must be an integer >= 0, got 1.5"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("bna", **settings)


def test_a_gate_between_unready_models_is_refused():
    model, images = Backdoored(), lit_images(3)[0]
    with pytest.raises(ValueError, match="suspect must be in eval mode, got train mode"):
        methods.detect_triggered(model, copy.deepcopy(model).eval(), images, 0)
    model.eval()
    with pytest.raises(ValueError, match="target must be a class of the model, 0 to 2, got 3"):
        methods.detect_triggered(model, model, images, 3)
