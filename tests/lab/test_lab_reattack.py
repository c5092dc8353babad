"""Attacks on purified models: they wake a backdoor that only sleeps, and change nothing else."""

import copy
from types import SimpleNamespace

import pytest
import torch
from lab_cases import make_set
from torch import nn

from fst_fast import DeviceLoader, evaluate
from fst_fast.data.image_sets import ImageSet
from fst_fast.lab.models import resnet8
from fst_fast.lab.reattack import BOUND, Perturbation, reactivate, retune
from fst_fast.lab.train import Attack, TrainSettings, train_suspect
from fst_fast.triggers import BadNets

NORMALIZE = ((0.4, 0.5, 0.6), (0.25, 0.25, 0.25))
TRIGGER = BadNets()


def success(model, data):
    loader = DeviceLoader(data.images, data.labels, shuffle=False, normalize=NORMALIZE)
    return evaluate(model, loader, TRIGGER)


@pytest.fixture(scope="module")
def models():
    """A backdoored one, one that sleeps (its head no longer listens), and a clean one."""
    data = make_set(400, 0)
    settings = TrainSettings(epochs=10, lr=0.1)

    def build():
        return resnet8(num_classes=4, width=4)

    made = {}
    for name, attack in (("suspect", Attack(TRIGGER, 0.1)), ("clean", None)):
        made[name], _ = train_suspect(build, data, attack, settings, normalize=NORMALIZE)
    return SimpleNamespace(**made)


@pytest.fixture(scope="module")
def known():
    return make_set(200, 1)


def test_the_models_are_what_the_tests_need(models):
    test = make_set(200, 2)
    assert success(models.suspect, test).attack_success > 0.9
    assert success(models.clean, test).attack_success < 0.1
    assert success(models.clean, test).clean_accuracy > 0.9


def test_retuning_wakes_a_backdoor_whose_head_was_replaced(models, known):
    test = make_set(200, 2)
    asleep = copy.deepcopy(models.suspect)
    with torch.no_grad():
        asleep.head.weight.copy_(models.clean.head.weight)
        asleep.head.bias.copy_(models.clean.head.bias)
    settings = {"normalize": NORMALIZE, "poisoned": 10, "epochs": 8}
    woken = retune(asleep, known, TRIGGER, **settings)
    fresh = retune(models.clean, known, TRIGGER, **settings)
    assert success(woken, test).attack_success > success(fresh, test).attack_success + 0.2


def test_retuning_leaves_the_model_and_the_random_state(models, known):
    before = copy.deepcopy(models.suspect.state_dict())
    state = torch.get_rng_state()
    one, two = (
        retune(models.suspect, known, TRIGGER, normalize=NORMALIZE, epochs=1) for _ in range(2)
    )
    assert torch.equal(state, torch.get_rng_state())
    for name, value in models.suspect.state_dict().items():
        assert torch.equal(value, before[name])
    assert not one.training
    for (name, value), other in zip(
        one.state_dict().items(), two.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    assert any(not torch.equal(v, before[n]) for n, v in one.state_dict().items())


def test_the_perturbation_is_bounded():
    torch.manual_seed(0)
    perturb = Perturbation(12, width=8)
    with torch.no_grad():
        for parameter in perturb.parameters():
            parameter.mul_(100)
    x = torch.rand(5, 3, 2, 2)
    changed = perturb(x)
    assert changed.shape == x.shape
    assert (changed - x).abs().max() <= BOUND + 1e-6
    assert (changed - x).abs().max() > 0.9 * BOUND
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert sum(isinstance(m, nn.Linear) for m in perturb.modules()) == 4


class Blue(nn.Module):
    """The target, where the image is bluer than a level; else the class of its red."""

    def __init__(self, level):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))

    def forward(self, x):
        red, blue = x[:, 0].mean((1, 2)), x[:, 2].mean((1, 2))
        zero = torch.zeros_like(red)
        return torch.stack([40 * (blue - self.level), red - 0.5, zero], dim=1)


def test_reactivation_finds_what_wakes_the_model():
    """The purified model's target needs a little more blue than the trigger brings."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(60, 120, (80, 6, 6, 3), generator=generator)
    labels = torch.full((80,), 2)
    images[:40, ..., 0] += 100
    labels[:40] = 1
    data = ImageSet(images.to(torch.uint8), labels, tuple("abc"))

    class MoreBlue(BadNets):
        def _apply(self, images):
            return images + torch.tensor([0, 0, 60], dtype=torch.uint8)

    models = Blue(0.63), Blue(0.5), Blue(2.0)
    found = reactivate(
        *models,
        data,
        data,
        MoreBlue(),
        normalize=None,
        images=60,
        epochs=30,
        lr=0.02,
        batch_size=20,
    )
    assert success_of(models[0], MoreBlue().apply(data.images)) == 0
    assert found.success > 0.8
    assert found.transfer == 1
    assert found.clean_success < 0.1
    assert all(p.grad is None for model in models for p in model.parameters())


def success_of(model, images):
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (model(pixels).argmax(1) == 0).float().mean().item()


@pytest.mark.parametrize("count", [0, 151])
def test_retuning_refuses_in_words(models, known, count):
    with pytest.raises(ValueError, match=rf"poisoned must be in 1..150, .* got {count}; the paper"):
        retune(models.clean, known, TRIGGER, normalize=NORMALIZE, poisoned=count)


def test_reactivation_refuses_in_words(models, known):
    three = (models.suspect, models.suspect, models.clean)
    with pytest.raises(ValueError, match=r"images must be in 1..200, .* got 500; the paper's"):
        reactivate(*three, known, known, TRIGGER, normalize=NORMALIZE)
    alone = known.subset(known.labels == 0)
    with pytest.raises(ValueError, match=r"test must hold images of other classes than 0"):
        reactivate(*three, known, alone, TRIGGER, normalize=NORMALIZE, images=10)
