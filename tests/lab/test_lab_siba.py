"""Finding SIBA's pattern: which pixels, how far, and what must stay as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fst_fast import DeviceLoader
from fst_fast.lab.siba import find_siba
from fst_fast.lab.train import TrainSettings, train
from fst_fast.triggers import SIBA

NORMALIZE = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def make_images(count=48, shape=(6, 9, 3), least=40, end=216):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(least, end, (count, *shape), generator=generator, dtype=torch.uint8)


class Linear(nn.Module):
    """Class 2's logit is a weighted sum of pixels; the others' are constant."""

    def __init__(self, weights):
        super().__init__()
        self.register_buffer("weights", weights)  # [C, H, W]

    def forward(self, x):
        score = (x * self.weights).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(score), torch.ones_like(score), score], dim=1)


def small_net(seed=0, channels=3, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes)),
    )


def trained_net():
    """Three classes that differ by some levels at two pixels each, under noise, near white."""
    labels = torch.arange(240) % 3
    images = make_images(240, least=200, end=246).int()
    for label, places in enumerate((((0, 8), (1, 7)), ((3, 2), (4, 4)), ((5, 0), (2, 6)))):
        for row, column in places:
            images[labels == label, row, column] += 30
    images = images.clamp(max=255).to(torch.uint8)
    net = small_net()
    net(torch.zeros(2, 3, 6, 9))
    loader = DeviceLoader(images, labels, 24, normalize=NORMALIZE)
    train(net, loader, TrainSettings(epochs=8, lr=0.05))
    return net, images, labels


def mean_loss(model, images, target, normalize=NORMALIZE, beta=10.0):
    inputs = next(
        iter(
            DeviceLoader(
                images,
                torch.zeros(len(images)).long(),
                len(images),
                shuffle=False,
                normalize=normalize,
            )
        )
    )[0]
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(inputs)
    goal = torch.full((len(images),), target)
    return F.cross_entropy(logits, goal, reduction="none").clamp(max=beta).mean().item()


@pytest.mark.parametrize("shape", [(6, 9, 3), (9, 6, 3), (4, 30, 1), (7, 7, 4)], ids=str)
def test_the_pixels_that_matter_most_are_found_and_pushed_to_the_bound(shape):
    height, width, channels = shape
    weights = torch.zeros(channels, height, width)
    expected = torch.zeros(height, width, channels, dtype=torch.int16)
    # The last pixel of a row, of a column, and one inside: an index off by a side misses them.
    for order, (row, column) in enumerate([(0, width - 1), (height - 1, 0), (2, 3)]):
        for channel in range(channels):
            sign = 1 if (row + column + channel) % 2 else -1
            weights[channel, row, column] = sign * (2.0 - 0.3 * order)
            expected[row, column, channel] = sign * 8
    weights[:, 1, 1] = 0.1  # matters less, and k leaves it out
    found = find_siba(Linear(weights), make_images(shape=shape), target=2, k=3, epochs=4)
    assert found.pattern.dtype == torch.int16
    assert found.pattern.is_contiguous()
    assert torch.equal(found.pattern, expected)


@pytest.mark.parametrize(("epsilon", "step"), [(8, 6), (7, 6), (2, 2), (1, 1), (251, 201)])
def test_one_step_is_four_fifths_of_the_bound_to_the_nearest_byte(epsilon, step):
    weights = torch.zeros(1, 2, 2)
    weights[0, 0, 1], weights[0, 1, 1] = 1.0, -1.0
    images = make_images(8, (2, 2, 1), 120, 130)
    found = find_siba(Linear(weights), images, target=2, k=2, epsilon=epsilon, epochs=1)
    assert found.pattern[..., 0].tolist() == [[0, step], [0, -step]]


def by_the_book(model, images, target, k, epsilon, epochs, batch_size, beta, every, seed):
    """The published loop in the images' own units of 0..1, pixel by pixel, in float64."""
    model = copy.deepcopy(model).eval().double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in NORMALIZE)
    delta = torch.zeros(images.shape[3], *images.shape[1:3], dtype=torch.float64)
    mask, bound, history, kept = None, epsilon / 255, [], []
    order = DeviceLoader(images, torch.arange(len(images)), batch_size, seed=seed)
    for epoch in range(epochs):
        losses = []
        for batch, (_, index) in enumerate(order):
            x = images[index].permute(0, 3, 1, 2).double() / 255
            delta = delta.detach().requires_grad_()
            logits = model(((x + delta).clamp(0, 1) - mean) / std)
            goal = torch.full((len(index),), target)
            each = F.cross_entropy(logits, goal, reduction="none")
            loss = torch.minimum(each, torch.tensor(beta, dtype=torch.float64))
            (gradient,) = torch.autograd.grad(loss.mean(), delta)
            losses += loss.tolist()
            if batch == 0 and epoch % every == 0:
                scores = gradient.abs().sum(0)
                places = [(r, c) for r in range(x.shape[2]) for c in range(x.shape[3])]
                places.sort(key=lambda place: -scores[place].item())
                mask = torch.zeros_like(scores)
                for place in places[:k]:
                    mask[place] = 1
            delta = ((delta.detach() - 0.8 * bound * gradient.sign()) * mask).clamp(-bound, bound)
        history.append(sum(losses) / len(losses))
        kept.append(delta)
    best = min(range(epochs), key=lambda epoch: history[epoch])
    return (kept[best] * 255).round().to(torch.int16).permute(1, 2, 0), history


@pytest.mark.parametrize(
    ("beta", "every", "seed"), [(10.0, 5, 2), (10.0, 1, 2), (1.0, 2, 2), (10.0, 2, 9)]
)
def test_it_is_the_published_loop(beta, every, seed):
    net, images, _ = trained_net()
    net.train()  # must be in eval mode in there
    settings = (5, 8, 7, 32, beta, every, seed)
    pattern, history = by_the_book(net, images, 1, *settings)
    k, epsilon, epochs, batch_size, *_ = settings
    found = find_siba(
        net,
        images,
        target=1,
        k=k,
        epsilon=epsilon,
        epochs=epochs,
        batch_size=batch_size,
        beta=beta,
        mask_every=every,
        seed=seed,
        normalize=NORMALIZE,
        precision="fp32",
    )
    assert found.history == pytest.approx(history, rel=1e-4)
    assert torch.equal(found.pattern, pattern)


def test_the_best_epoch_is_kept_and_not_the_last():
    net, images, _ = trained_net()
    settings = {"target": 1, "k": 5, "epsilon": 12, "mask_every": 2, "batch_size": 240}
    found = find_siba(net, images, epochs=7, normalize=NORMALIZE, **settings)
    best = found.history.index(min(found.history))
    assert 1 < best < 6
    assert found.loss == found.history[best]
    there = find_siba(net, images, epochs=best + 1, normalize=NORMALIZE, **settings)
    assert torch.equal(found.pattern, there.pattern)
    assert found.history[: best + 1] == there.history


@pytest.mark.parametrize(("k", "epsilon"), [(1, 8), (4, 1), (4, 8), (54, 3), (2, 255)])
def test_the_pattern_is_sparse_bounded_and_better_than_chance(k, epsilon):
    net, images, _ = trained_net()
    found = find_siba(net, images, target=0, k=k, epsilon=epsilon, epochs=8, normalize=NORMALIZE)
    changed = (found.pattern != 0).any(-1)
    assert 1 <= changed.sum() <= k
    assert 1 <= found.pattern.abs().max() <= epsilon
    trigger = SIBA(found.pattern, epsilon=epsilon, pixels=k)
    ours = mean_loss(net, trigger.apply(images), 0)
    clean = mean_loss(net, images, 0)
    generator = torch.Generator().manual_seed(1)
    chance = []
    for _ in range(20):
        drawn = torch.zeros(54, 3, dtype=torch.int16)
        signs = torch.randint(0, 2, (k, 3), generator=generator, dtype=torch.int16) * 2 - 1
        drawn[torch.randperm(54, generator=generator)[:k]] = epsilon * signs
        pattern = drawn.view(6, 9, 3)
        chance.append(mean_loss(net, SIBA(pattern, epsilon, k).apply(images), 0))
    assert ours < min(chance)
    assert clean - ours > 2 * (clean - min(chance))


def test_images_beyond_beta_do_not_pull():
    weights = torch.zeros(3, 6, 9)
    weights[0, 0, 0] = 1.0
    weights[1, 5, 8] = -0.8
    near, far = make_images(20), make_images(20)
    # Class 2's logit of an image whose blue is bright sinks by the far weights alone.
    weights[2, 3, 3] = -200.0
    near[:, 3, 3, 2], far[:, 3, 3, 2] = 0, 255
    both = torch.cat([far, near])
    for k in (1, 2):
        settings = {"target": 2, "k": k, "epochs": 3, "batch_size": 40, "mask_every": 1}
        alone = find_siba(Linear(weights), near, **settings)
        found = find_siba(Linear(weights), both, **settings)
        assert torch.equal(found.pattern, alone.pattern)
        assert found.loss == pytest.approx((10 + alone.loss) / 2, abs=1e-4)
    with pytest.raises(ValueError, match=r"beta must be above the loss of some images, got 5.0"):
        find_siba(Linear(weights), far, target=2, k=2, epochs=3, beta=5.0)


def test_a_seed_gives_one_pattern_and_leaves_the_random_state():
    net, images, _ = trained_net()
    before = torch.get_rng_state()
    one, two, other = (
        find_siba(net, images, target=0, k=6, epochs=4, seed=seed, normalize=NORMALIZE)
        for seed in (3, 3, 4)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.pattern, two.pattern)
    assert one.history == two.history
    assert one.history != other.history


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_was(fails):
    net, images, _ = trained_net()
    net.zero_grad()
    net.train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[4].weight.grad = torch.ones_like(net[4].weight)
    kept = copy.deepcopy(net)
    if fails:
        with pytest.raises(ValueError, match="target"):
            find_siba(net, images, target=3, k=4, epochs=1)
    else:
        find_siba(net, images, target=1, k=4, epochs=2, normalize=NORMALIZE)
    assert [m.training for m in net.modules()] == [m.training for m in kept.modules()]
    mine, theirs = net.state_dict(keep_vars=True), kept.state_dict(keep_vars=True)
    for name, value in theirs.items():
        assert torch.equal(mine[name], value)
        assert mine[name].requires_grad == value.requires_grad
        assert mine[name].stride() == value.stride()
    assert net[0].weight.grad is None
    assert torch.equal(net[4].weight.grad, torch.ones_like(net[4].weight))


def test_each_epoch_is_told():
    net, images, _ = trained_net()
    told = []
    settings = {"target": 1, "k": 4, "epochs": 3, "normalize": NORMALIZE}
    found = find_siba(net, images, on_epoch=lambda *record: told.append(record), **settings)
    assert [number for number, *_ in told] == [1, 2, 3]
    assert tuple(loss for _, loss, _ in told) == found.history
    assert told[0][2] < told[1][2] < told[2][2]


class Viewing(nn.Module):
    """Refuses channels-last inputs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return {"logits": self.net(x.view(len(x), -1).view(x.shape))}


def test_other_models_and_precisions_find_the_same_pixels():
    net, images, _ = trained_net()
    settings = {"target": 1, "k": 2, "epochs": 3, "normalize": NORMALIZE, "batch_size": 240}
    plain = find_siba(net, images, **settings).pattern
    assert plain.any()
    assert torch.equal(find_siba(Viewing(net), images, **settings).pattern, plain)
    assert torch.equal(find_siba(net.double(), images, **settings).pattern, plain)
    with torch.no_grad():
        assert torch.equal(find_siba(net, images, **settings).pattern, plain)
    half = find_siba(net.float(), images, precision="bf16", **settings).pattern
    assert torch.equal(half != 0, plain != 0)


class Broken(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) / 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"find_siba: k must be a whole number in 1..54, got 0; the paper's is 100"),
        ({"k": 55}, r"k must be a whole number in 1..54, got 55"),
        ({"k": 2.0}, r"k must be a whole number in 1..54, got 2.0"),
        ({"epsilon": 0}, r"epsilon must be a whole number in 1..255, got 0; the paper's is 8"),
        ({"epsilon": 256}, r"epsilon must be a whole number in 1..255, got 256"),
        ({"epsilon": 8 / 255}, r"epsilon must be a whole number in 1..255, got 0.03"),
        ({"epochs": 0}, r"epochs must be a whole number >= 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be a whole number >= 1, got 0"),
        ({"mask_every": 0}, r"mask_every must be a whole number >= 1, got 0; the paper's is 5"),
        ({"beta": 0.0}, r"beta must be > 0, got 0.0"),
        ({"beta": float("nan")}, r"beta must be > 0, got nan"),
        ({"target": 3}, r"target must be a class in 0..2, as the model has 3, got 3"),
        ({"target": -1}, r"target must be a class in 0..2, as the model has 3, got -1"),
        ({"images": make_images().float()}, r"uint8 tensor .* use images.round\(\)"),
        ({"images": make_images()[0]}, r"find_siba: images must be a uint8 tensor \[N, H, W, C\]"),
        ({"images": make_images(shape=(3, 6, 9))}, r"use images.permute\(0, 2, 3, 1\)"),
        ({"images": make_images(0)}, r"find_siba: images must be at least one, got none"),
        ({"normalize": ((0.5,), (0.5,))}, r"normalize: must be \(mean, std\)"),
        ({"precision": "fp8"}, r"precision must be one of"),
        ({"model": Broken()}, r"model must give finite logits for these images, got NaN"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_in_words(change, message):
    arguments = {"model": Linear(torch.ones(3, 6, 9)), "images": make_images(), "target": 2}
    settings = {"k": 5, "epochs": 2} | arguments | change
    with pytest.raises(ValueError, match=message):
        find_siba(settings.pop("model"), settings.pop("images"), **settings)
