"""Batches in two halves: what the loader would give; features computed once where images stay."""

import pytest
import torch
from purify_cases import CLASSES, equal_states, make_batches, make_model, quick
from torch import nn

import fst_fast
from fst_fast.data.batches import Batches
from fst_fast.data.device_loader import DeviceLoader
from fst_fast.tuning.batch_source import FeatureFeed, LoaderFeed, ResidentFeed, open_feed

CPU = torch.device("cpu")


def device_loader(kind=DeviceLoader, **more):
    images = torch.randint(0, 256, (21, 8, 8, 3), generator=torch.Generator().manual_seed(4))
    return kind(images.to(torch.uint8), torch.arange(21) % CLASSES, 8, seed=3, **more)


class Own(DeviceLoader):
    """Yields what no table says."""

    def __iter__(self):
        yield from make_batches()


def opened(loader, keeps=False):
    batches = Batches(loader, 3, "purify: loader")
    return open_feed(batches, lambda images: images, CPU, CLASSES, keeps)


def one_by_one(feed, epoch):
    for kind, size, count in feed.epoch(epoch):
        for _ in range(count):
            yield kind, size


@pytest.mark.parametrize(
    ("loader", "kind"),
    [
        (device_loader(), ResidentFeed),
        (device_loader(resident=False), LoaderFeed),
        (device_loader(Own), LoaderFeed),
        (make_batches(), LoaderFeed),
    ],
    ids=["resident", "streamed", "subclass", "list"],
)
def test_which_feed(loader, kind):
    assert type(opened(loader)) is kind


def test_labels_that_are_no_class_are_told_in_words():
    images = torch.zeros(9, 8, 8, 3, dtype=torch.uint8)
    loader = DeviceLoader(images, torch.tensor([0] * 8 + [CLASSES]), 3, shuffle=False)
    with pytest.raises(ValueError, match=r"classes in 0\.\.3, as the model has 4, got 4"):
        quick(make_model(), loader)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("poison", [{}, {"poisoned": 0.4, "trigger": fst_fast.triggers.BadNets()}])
def test_a_resident_loader_s_batches(drop_last, poison):
    loader = device_loader(augment="cifar", drop_last=drop_last, **poison)
    feed = opened(loader)
    for epoch in (0, 2, 1):
        loader.set_epoch(epoch)
        wanted = list(loader)
        for (kind, size), (images, labels) in zip(one_by_one(feed, epoch), wanted, strict=True):
            assert size == len(labels)
            # Asked twice, the same batch comes: a step may have to begin anew.
            for _ in range(2):
                got = feed.take(kind)
                assert torch.equal(got[0], images)
                assert torch.equal(got[1], labels)
            feed.advance(kind)


def test_batches_of_one_shape_take_the_same_memory():
    batches = [*make_batches(2), *make_batches(1, size=5)]
    feed = opened(batches, keeps=True)
    places = []
    for (kind, _, count), (images, labels) in zip(feed.epoch(1), batches, strict=True):
        # The next is the host's to copy.
        assert count == 1
        got = feed.take(kind)
        assert torch.equal(got[0], images)
        assert torch.equal(got[1], labels)
        places.append(got[0].data_ptr())
    assert places[0] == places[1] != places[2]
    # The loader's own tensors are not written to.
    assert not torch.equal(batches[0][0], batches[1][0])
    assert batches[0][0].data_ptr() not in places


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = make_model(), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


FIXED = {
    "list": lambda: [*make_batches(2), *make_batches(1, size=5)],
    "DeviceLoader": device_loader,
    "DeviceLoader, poisoned": lambda: device_loader(
        trigger=fst_fast.triggers.BadNets(), poisoned=0.3, relabel="all-to-all"
    ),
}
CHANGING = {
    "augmented": lambda: device_loader(augment="cifar"),
    "drops images": lambda: device_loader(drop_last=True),
    "factory": lambda: lambda: iter(make_batches()),
}


def calls_of(loader, epochs, **more):
    model = Counting()
    result = quick(model, loader, method="lp", epochs=epochs, lr=0.1, inplace=True, **more)
    return model.calls, result


@pytest.mark.parametrize("name", FIXED)
def test_lp_computes_the_features_of_fixed_images_once(name):
    few, _ = calls_of(FIXED[name](), 1)
    many, cached = calls_of(FIXED[name](), 6)
    assert many == few

    class Plain(fst_fast.methods.get("lp").__class__):
        def loss(self, logits, labels, head):
            return super().loss(logits, labels, head)

    _, whole = calls_of(FIXED[name](), 6, alpha=None)
    by_logits = quick(Counting(), FIXED[name](), method=Plain(), epochs=6, lr=0.1)
    for one, other in zip(cached.history, by_logits.history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.clean_accuracy == other.clean_accuracy
    torch.testing.assert_close(
        cached.model.net[-1].weight, by_logits.model.net[-1].weight, rtol=1e-5, atol=1e-6
    )
    assert equal_states(cached.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("name", CHANGING)
def test_lp_computes_features_anew_where_images_change(name):
    few, _ = calls_of(CHANGING[name](), 1)
    many, _ = calls_of(CHANGING[name](), 3)
    assert many > few


def test_equal_batches_of_a_table_follow_one_another():
    rows, labels = torch.zeros(17, 1), torch.arange(17)
    feed = FeatureFeed(rows, labels, [4, 4, 4, 1, 4], None)
    assert list(feed.epoch(0)) == [(4, 4, 3), (1, 1, 1), (4, 4, 1)]


def test_features_are_rows_of_a_table():
    features, labels = torch.arange(10.0)[:, None], torch.arange(10)
    feed = FeatureFeed(features, labels, [4, 4, 2], lambda epoch: torch.arange(10).roll(epoch))
    for epoch in (0, 3):
        seen = []
        for kind, _ in one_by_one(feed, epoch):
            rows, names = feed.take(kind)
            assert torch.equal(rows[:, 0].long(), names)
            seen.append(names)
            feed.advance(kind)
        assert torch.equal(torch.cat(seen), torch.arange(10).roll(epoch))
