"""Poisoning, the small residual networks, and training them."""

import copy

import pytest
import torch
from torch import nn

from fst_fast import DeviceLoader
from fst_fast.data.image_sets import ImageSet
from fst_fast.lab import models
from fst_fast.lab.train import Attack, TrainSettings, train, train_suspect
from fst_fast.triggers import BadNets, WaNet
from fst_fast.triggers.poisoning import poison as poison_set

TRIGGER = BadNets(size=2)


def make_set(count=200, classes=5):
    images = torch.randint(0, 200, (count, 6, 7, 3), dtype=torch.uint8)
    return images, torch.arange(count) % classes


@pytest.mark.parametrize(
    ("rate", "count"), [(0.1, 20), (0.05, 10), (0.013, 3), (0.002, 0), (0.8, 160), (0, 0)]
)
def test_poisoned_images_are_as_many_as_asked_and_of_other_classes(rate, count):
    images, labels = make_set()
    kept = images.clone(), labels.clone()
    out = poison_set(images, labels, TRIGGER, rate=rate, target=2, seed=1)
    assert torch.equal(images, kept[0])
    assert torch.equal(labels, kept[1])
    assert out.mask.dtype == torch.bool
    assert out.mask.sum() == count
    assert not (labels[out.mask] == 2).any()
    assert (out.labels[out.mask] == 2).all()
    assert (out.images[out.mask][:, -2:, -2:] == 255).all()
    assert torch.equal(out.images[out.mask][:, :-2], images[out.mask][:, :-2])
    assert torch.equal(out.images[~out.mask], images[~out.mask])
    assert torch.equal(out.labels[~out.mask], labels[~out.mask])
    assert out.images.data_ptr() != images.data_ptr()
    assert out.labels.data_ptr() != labels.data_ptr()


def test_the_seed_chooses_the_images():
    images, labels = make_set()
    masks = [
        poison_set(images, labels, TRIGGER, rate=0.1, target=2, seed=seed).mask
        for seed in (1, 1, 2)
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    chosen = labels[masks[0]]
    assert len(chosen.unique()) == 4  # drawn from all other classes, not from the first ones


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (-0.1, "rate must lie in 0..1, got -0.1"),
        (1.5, "rate must lie in 0..1, got 1.5"),
        (float("nan"), "rate must lie in 0..1, got nan"),
        (0.9, "asks for 180 images, but only 160 are not of class 2; use a rate up to 0.800"),
    ],
)
def test_impossible_rates_are_refused(rate, message):
    with pytest.raises(ValueError, match=message):
        poison_set(*make_set(), TRIGGER, rate=rate, target=2)


@pytest.mark.parametrize(("width", "channels", "classes"), [(4, 3, 10), (8, 1, 7), (2, 4, 2)])
@pytest.mark.parametrize(("name", "last"), [("resnet18", 8), ("resnet8", 4)])
def test_networks_take_their_images(name, last, width, channels, classes):
    model = getattr(models, name)(classes, width, channels).eval()
    features = []
    model.head.register_forward_hook(lambda _, inputs, output: features.append(inputs[0]))
    for side in (16, 11):
        assert model(torch.rand(2, channels, side, side)).shape == (2, classes)
    assert features[0].shape == (2, width * last)
    # Every stage after the first halves the resolution, and nothing else does.
    stages = {"resnet18": 4, "resnet8": 3}[name]
    assert model.blocks(torch.rand(1, width, 16, 16)).shape[-1] == 16 // 2 ** (stages - 1)


def test_resnet18_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = models.resnet18(10, 64)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    # Stem, two convolutions in each of eight blocks, three projections.
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 16 + 3
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == len(convolutions)
    assert all(m.bias is None for m in convolutions)


def test_a_block_adds_its_input():
    block = models.BasicBlock(4, 4, 1).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 5, 5)
    assert torch.equal(block(x), x)
    assert isinstance(models.BasicBlock(4, 4, 2).shortcut, nn.Sequential)
    assert isinstance(models.BasicBlock(4, 8, 1).shortcut, nn.Sequential)


def separable_loader(seed=0, batch_size=16):
    """Two classes, dark and bright."""
    labels = torch.arange(64) % 2
    images = torch.randint(0, 100, (64, 6, 6, 3), generator=torch.Generator().manual_seed(9))
    images += labels[:, None, None, None] * 150
    return DeviceLoader(images.to(torch.uint8), labels, batch_size, seed=seed)


def small_model(seed=0):
    torch.manual_seed(seed)
    return models.resnet8(2, width=4)


def trained(settings, seed=0, loader_seed=0):
    model, history = small_model(seed), []
    train(model, separable_loader(loader_seed), settings, lambda *record: history.append(record))
    return model, history


def test_training_learns_and_leaves_the_model_ready():
    model, history = trained(TrainSettings(epochs=6, lr=0.1))
    assert [epoch for epoch, _, _ in history] == list(range(1, 7))
    losses = [loss for _, loss, _ in history]
    assert losses[0] > 0.3
    assert losses[-1] < 0.02
    assert sorted(seconds for *_, seconds in history) == [seconds for *_, seconds in history]
    assert not any(module.training for module in model.modules())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    for images, labels in separable_loader():
        assert torch.equal(model(images).argmax(1), labels)


def test_the_reported_loss_is_the_mean_over_the_batches():
    """With a rate of nearly 0 the model stands still, so that the loss can be worked out."""
    model, loader = nn.Sequential(nn.Flatten(), nn.Linear(108, 2)), separable_loader()
    still = copy.deepcopy(model)
    seen = []
    settings = TrainSettings(epochs=1, lr=1e-30, weight_decay=0.0)
    seconds = train(model, loader, settings, lambda *record: seen.append(record))
    loader.set_epoch(0)
    losses = [nn.functional.cross_entropy(still(x), y).item() for x, y in loader]
    assert seen[0][1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert 0 < seen[0][2] <= seconds


def test_training_repeats_itself_for_a_seed():
    settings = TrainSettings(epochs=2, lr=0.1)
    one, two, other = (trained(settings, 1, seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("setting", "values"),
    [("momentum", (0.5, 0.95)), ("weight_decay", (0.0, 0.1)), ("lr", (0.01, 0.1))],
)
def test_every_setting_counts(setting, values):
    weights = [
        trained(TrainSettings(epochs=1, **{setting: value}))[0].head.weight for value in values
    ]
    assert not torch.equal(*weights)


def test_bf16_training_learns_too():
    model, history = trained(TrainSettings(epochs=6, lr=0.1, precision="bf16"))
    assert history[-1][1] < 0.05
    assert model.head.weight.dtype == torch.float32


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 64), (4, 64), (2, 32), (1, 16), (5, 64)])
def test_few_steps_are_enough(epochs, batch_size):
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 2))
    before = model[1].weight.detach().clone()
    assert train(model, separable_loader(0, batch_size), TrainSettings(epochs=epochs, lr=0.01)) > 0
    assert not torch.equal(model[1].weight, before)


def test_a_suspect_is_trained_on_what_its_attack_covers(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fst_fast.lab.train.train", lambda model, loader, *more: seen.append(loader) or 0.0
    )
    data = ImageSet(torch.randint(0, 200, (40, 8, 8, 3)).to(torch.uint8), torch.arange(40) % 4, ())
    settings = {"settings": TrainSettings(epochs=1), "normalize": None, "seed": 3}
    for attack in (None, Attack(WaNet(), 0.1, 2, cover=0.2)):
        train_suspect(lambda: nn.Linear(1, 1), data, attack, **settings)
    clean, bad = seen
    assert torch.equal(clean.images, data.images)
    expected = poison_set(data.images, data.labels, WaNet(), rate=0.1, target=2, cover=0.2, seed=3)
    assert torch.equal(bad.images, expected.images)
    assert torch.equal(bad.labels, expected.labels)
    uncovered = poison_set(data.images, data.labels, WaNet(), rate=0.1, target=2, seed=3)
    assert not torch.equal(expected.images, uncovered.images)
