"""bti_dbf: features are decoupled, the trigger is inverted by the rest of them, and unlearnt."""

import copy

import pytest
import torch
from method_cases import SEED, Descent, assert_follows, problem, run
from torch import nn
from torch.nn import functional as F

from fst_fast import methods
from fst_fast.methods.adam import Adam
from fst_fast.methods.bti_dbf import Generator, head_inputs

EPOCHS, SIZE = 6, 12
SETTINGS = {"share": 0.25, "rounds": 2, "mask_steps": 5, "invert_steps": 6, "invert_lr": 0.05}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_is_torchs(dtype):
    torch.manual_seed(0)
    ours = [torch.randn(3, 4, dtype=dtype), torch.randn(5, dtype=dtype)]
    theirs = [nn.Parameter(tensor.clone()) for tensor in ours]
    adam, truth = Adam(ours, 0.01), torch.optim.Adam(theirs, 0.01)
    for number in range(50):
        if number == 30:
            adam.reset()
            truth = torch.optim.Adam(theirs, 0.01)
        for parameter in theirs:
            parameter.grad = torch.randn_like(parameter)
        adam.step([parameter.grad for parameter in theirs])
        truth.step()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=tolerance, atol=tolerance)


def features_of(model, images):
    x = F.silu(model.bn1(model.conv1(images)))
    return F.silu(x + model.bn2(model.conv2(x))).mean((2, 3))


class Changed(nn.Module):
    """The published loop's generator, which here is a network beside a pattern."""

    def __init__(self, low, high):
        super().__init__()
        self.first, self.second, self.third = (
            nn.Conv2d(*channels, 3, padding=1) for channels in ((3, 32), (32, 32), (32, 3))
        )
        with torch.no_grad():
            self.third.weight.mul_(0.1)
        self.pattern = nn.Parameter(torch.zeros(3, 8, 8))
        self.low, self.high = low, high
        self.double()

    def forward(self, x):
        y = self.third(F.relu(self.second(F.relu(self.first(x)))))
        return torch.minimum(torch.maximum(x + y + self.pattern, self.low), self.high)


def transcribe(model, batches):
    """The algorithm in one straight line; also how the inverted images moved the features."""
    torch.manual_seed(SEED)
    model = copy.deepcopy(model)
    pool, pool_labels = batches[0]
    extremes = (torch.amin, torch.amax)
    change = Changed(*(extreme(pool, (0, 2, 3), keepdim=True) for extreme in extremes))
    descent, losses, moves = Descent(model, EPOCHS), [], []
    for epoch, (images, labels) in enumerate(batches):
        if epoch in (0, EPOCHS // 2):
            model.eval()
            theta = torch.zeros(8, dtype=torch.float64, requires_grad=True)
            mask_adam = torch.optim.Adam([theta], 0.04)
            generator_adam = torch.optim.Adam(change.parameters(), 0.05)
            if epoch:
                noisy = change(pool + 0.03 * torch.randn_like(pool))
                target = model(noisy).argmax(1).bincount().argmax()
            for _ in range(5):
                rows = torch.randint(SIZE, (SIZE,))
                mask = theta.tanh() / 2 + 0.5
                phi = features_of(model, pool[rows])
                kept, left = (model.classify(phi * m) for m in (mask, 1 - mask))
                loss = F.cross_entropy(kept, pool_labels[rows])
                loss = loss - F.cross_entropy(left, pool_labels[rows])
                mask_adam.zero_grad()
                loss.backward()
                mask_adam.step()
            mask = (theta.tanh() / 2 + 0.5).detach()
            for _ in range(6):
                rows = torch.randint(SIZE, (SIZE,))
                shown = change(pool[rows])
                before, after = features_of(model, pool[rows]), features_of(model, shown)
                image = ((shown - pool[rows]) ** 2).mean()
                benign, other = (((m * (after - before)) ** 2).mean() for m in (mask, 1 - mask))
                loss = 0.01 * benign - other
                if epoch:
                    loss = loss + F.cross_entropy(model.classify(after), target.expand(SIZE))
                if image > 0.3 or benign > 3:
                    loss = image
                moves.append(other.item())
                generator_adam.zero_grad()
                loss.backward()
                generator_adam.step()
            model.train()
        rows = torch.rand(len(labels)).argsort()[:3]
        inputs = images.clone()
        inputs[rows] = change(images[rows]).detach()
        phi = features_of(model, torch.cat([inputs, images[rows]]))
        apart = ((phi[rows] - phi[SIZE:]) ** 2).sum() / (SIZE * 8)
        loss = F.cross_entropy(model.classify(phi[:SIZE]), labels) + apart
        descent.step(torch.autograd.grad(loss, list(model.parameters())))
        losses.append(loss.item())
    return losses, model, moves


def test_it_follows_the_transcription():
    model, batches = problem(EPOCHS, SIZE)
    result = run(model, batches, methods.get("bti_dbf", **SETTINGS))
    losses, truth, moves = transcribe(model, batches)
    assert_follows(result, losses, truth)
    assert moves[5] > 2 * moves[0], "the inversion moves the other features"


def test_rounds_are_spread_over_the_epochs():
    method = methods.get("bti_dbf", rounds=3)
    assert [e for e in range(10) if method.begins_round(e, 10)] == [0, 4, 7]
    assert [e for e in range(2) if method.begins_round(e, 2)] == [0, 1]


def test_the_generator_starts_near_the_image_and_stays_in_range():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 8, 8)
    zero, one = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    generator = Generator(images, zero, one)
    shown = generator(images)
    assert 0 < (shown - images).abs().max() < 0.2
    with torch.no_grad():
        generator.pattern.fill_(5)
    assert torch.equal(generator(images), torch.ones_like(images))


def test_what_the_head_is_given_can_be_seen_and_changed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    images = torch.randn(5, 1, 2, 2)
    with head_inputs(model[3], lambda features: 0 * features) as seen:
        logits = model(images)
    assert torch.equal(seen[0], model[:3](images))
    assert torch.equal(logits, model[3].bias.expand(5, 2))
    assert not model[3]._forward_pre_hooks


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"share": 1.5}, r"bti_dbf: share must be a number in 0..1, got 1.5; the default is 0.1"),
        ({"rounds": 0}, r"bti_dbf: rounds must be an integer >= 1, got 0; the default is 5"),
        ({"mask_lr": -1}, r"bti_dbf: mask_lr must be a number >= 0, got -1"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("bti_dbf", **settings)
