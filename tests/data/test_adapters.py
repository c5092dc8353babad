"""Kinds of loaders, each through its adapter: what they tell, and batches of one image."""

import collections
import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from fst_fast import DeviceLoader
from fst_fast.data import adapters, batches
from fst_fast.data.batches import Batches
from fst_fast.data.prefetch import HostLoader

CPU = torch.device("cpu")
IMAGES = torch.arange(9.0).view(9, 1, 1, 1) / 10
LABELS = torch.arange(9)
DATA = TensorDataset(IMAGES, LABELS)
PAIRS = list(zip(IMAGES.split(4), LABELS.split(4), strict=True))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(IMAGES, LABELS, strict=True))


def dicts(batch):
    return {"labels": batch[1], "pixel_values": batch[0], "id": 3}


class Own:
    """An iterable of the user's, which tells nothing."""

    def __iter__(self):
        return iter(PAIRS)


def device_loader():
    return DeviceLoader(torch.zeros(9, 2, 2, 3, dtype=torch.uint8), LABELS, 4, shuffle=False)


KINDS = {
    "list": (lambda: PAIRS, [4, 4, 1], True, False),
    "tuple": (lambda: tuple(PAIRS), [4, 4, 1], True, False),
    "DeviceLoader": (device_loader, [4, 4, 1], False, False),
    "DataLoader": (lambda: DataLoader(DATA, 4), [4, 4, 1], False, False),
    "drop_last": (lambda: DataLoader(DATA, 4, drop_last=True), [4, 4], False, False),
    "HostLoader": (lambda: HostLoader(DataLoader(DATA, 4), CPU), [4, 4, 1], False, True),
    "batch sampler": (
        lambda: DataLoader(
            DATA, batch_sampler=type("S", (BatchSampler,), {})(range(9), 4, drop_last=False)
        ),
        None,
        False,
        False,
    ),
    "stream": (lambda: DataLoader(Stream(), 4), None, False, False),
    "function": (lambda: lambda: (pair for pair in PAIRS), None, False, False),
    "partial": (lambda: functools.partial(iter, PAIRS), None, False, False),
    "own": (Own, None, False, False),
    "dicts": (lambda: [dicts(pair) for pair in PAIRS], [4, 4, 1], True, False),
    "user dicts": (
        lambda: [collections.UserDict(dicts(pair)) for pair in PAIRS],
        [4, 4, 1],
        True,
        False,
    ),
    "function of dicts": (lambda: lambda: map(dicts, PAIRS), None, False, False),
}


@pytest.mark.parametrize(("make", "sizes", "fixed", "ahead"), KINDS.values(), ids=KINDS)
def test_what_a_kind_of_loader_tells_is_true(make, sizes, fixed, ahead):
    found = Batches(make(), 2, "here: loader")
    assert found.sizes() == sizes
    assert (found.adapter.fixed, found.draws_ahead) == (fixed, ahead)
    for epoch in range(2):
        got = list(found.epoch(epoch))
        assert torch.cat([labels for _, labels in got]).tolist()[:8] == list(range(8))
        if sizes is not None:
            assert [len(labels) for _, labels in got] == sizes


@pytest.mark.parametrize("name", [name for name in KINDS if name != "drop_last"])
def test_a_last_batch_of_one_image_is_joined_to_the_one_before(name):
    make, sizes, _, _ = KINDS[name]
    found = Batches(make(), 2, "here: loader")
    plain = list(Batches(make(), 2, "here: loader").epoch(0))
    notes = []
    found.note = notes.append
    found.join_singles()
    if sizes is not None:
        assert found.sizes() == [4, 5]
    for epoch in range(2):
        got = list(found.epoch(epoch))
        assert [len(labels) for _, labels in got] == [4, 5]
        if epoch == 0:
            for part in range(2):
                joined = torch.cat([batch[part] for batch in got])
                assert torch.equal(joined, torch.cat([batch[part] for batch in plain]))
    assert len(notes) == 1
    assert "a batch of one image is joined to the one before it" in notes[0]
    assert found.draws_ahead == (KINDS[name][3] or sizes is None)


def test_without_singles_nothing_waits_and_nothing_is_said():
    asked = []

    def made():
        for pair in PAIRS[:2]:
            asked.append(len(pair[1]))
            yield pair

    found = Batches([*PAIRS[:2]], 1, "here: loader")
    found.note = pytest.fail
    found.join_singles()
    iterator = found.epoch(0)
    assert len(next(iterator)[1]) == 4
    # Of a kind that tells no sizes each batch waits for the next one.
    found = Batches(made, 1, "here: loader")
    found.join_singles()
    asked.clear()
    next(found.epoch(0))
    assert asked == [4, 4]


def test_batches_of_one_image_alone_are_refused():
    found = Batches(DataLoader(DATA, 1), 1, "here: loader")
    with pytest.raises(ValueError, match="here: loader must yield batches of two images or more"):
        found.join_singles()


@pytest.mark.parametrize("images", adapters.IMAGES)
@pytest.mark.parametrize("labels", ["labels", "label", "target", "y"])
def test_mappings_by_the_names_that_data_sets_use(images, labels):
    found = Batches([{"idx": 1, labels: LABELS, images: IMAGES}], 1, "here: loader")
    assert found.first[0] is IMAGES
    assert found.first[1] is LABELS


def test_a_mapping_of_other_names_is_refused_by_its_keys():
    with pytest.raises(ValueError, match=r"here: loader must .* a dict of picture, kind; adapt it"):
        Batches([{"picture": IMAGES, "kind": LABELS}], 1, "here: loader")


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (lambda images: images, "must be callable without arguments .* 'images'"),
        (nn.Identity(), "must be an iterable .* got Identity"),
        ("images/", "must be an iterable .* got str"),
        (np.float32(3), "must be an iterable .* got float32"),
    ],
)
def test_what_is_no_loader_is_refused(loader, words):
    with pytest.raises(ValueError, match=f"here: loader {words}"):
        Batches(loader, 1, "here: loader")


def test_a_distributed_sampler_is_told_the_epoch():
    sampler = DistributedSampler(DATA, num_replicas=1, rank=0, shuffle=True, seed=3)
    found = Batches(DataLoader(DATA, 4, sampler=sampler), 3, "here: loader")
    orders = [torch.cat([y for _, y in found.epoch(epoch)]).tolist() for epoch in (0, 1, 0)]
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]


def test_steps_end_an_epoch_and_a_stream_goes_on():
    found = Batches(itertools.cycle(PAIRS), 3, "here: loader", steps=2)
    seen = [[y[0].item() for _, y in found.epoch(epoch)] for epoch in range(3)]
    assert seen == [[0, 4], [8, 0], [4, 8]]
    found = Batches(PAIRS, 2, "here: loader", steps=2)
    assert [[y[0].item() for _, y in found.epoch(e)] for e in range(2)] == [[0, 4], [0, 4]]


def test_a_loader_without_an_end_says_so_once(monkeypatch):
    monkeypatch.setattr(batches, "NO_END", 5)
    found = Batches(lambda: itertools.cycle(PAIRS), 2, "here: loader")
    notes = []
    found.note = notes.append
    for _ in zip(range(20), found.epoch(0), strict=False):
        pass
    assert len(notes) == 1
    assert (
        "5 batches of the first epoch, and no end is in sight; .*steps_per_epoch".partition(".*")[0]
        in notes[0]
    )
    # A loader that tells its length has an end.
    quiet = Batches(PAIRS * 4, 2, "here: loader")
    quiet.note = pytest.fail
    assert len(list(quiet.epoch(0))) == 12
