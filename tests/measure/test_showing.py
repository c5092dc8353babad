"""What is evaluated: the same images from stored bytes as from any loader, under every trigger."""

import pytest
import torch
import zoo_cases
from torch import nn

from fst_fast import DeviceLoader, evaluate, triggers
from fst_fast.data.batches import Batches
from fst_fast.measure import triggered_batches

CPU = torch.device("cpu")
NORMALIZE = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
COUNT = 11
IMAGES = torch.randint(0, 256, (COUNT, 32, 32, 3), generator=torch.Generator().manual_seed(1))
IMAGES = IMAGES.to(torch.uint8)
LABELS = torch.arange(COUNT) % 4


def loader_of(**more):
    more = {"shuffle": False, "normalize": NORMALIZE, **more}
    return DeviceLoader(IMAGES, LABELS, 4, **more)


def shown(loader, named, normalize=NORMALIZE):
    """Images, labels and, for each trigger, triggered images, of the whole set."""
    parts = []
    batches = Batches(loader, 1, "here", at_once=True)
    for images, labels, triggered in triggered_batches.show(batches, named, normalize, CPU):
        parts.append((images, labels, *[triggered(t) for t in range(len(named))]))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def ways(monkeypatch):
    """Which of the two ways was taken."""
    taken = []
    for name in ("_from_bytes", "_from_loader"):
        real = getattr(triggered_batches, name)
        monkeypatch.setattr(
            triggered_batches, name, lambda *a, name=name, real=real: taken.append(name) or real(*a)
        )
    return taken


def test_every_trigger_from_bytes_and_from_a_loader(monkeypatch):
    named = [zoo_cases.make(name, IMAGES) for name in triggers.ZOO]
    taken = ways(monkeypatch)
    direct = shown(loader_of(), named)
    recovered = shown(lambda: loader_of(), named)
    assert taken == ["_from_bytes", "_from_loader"]
    assert len(direct) == 2 + len(triggers.ZOO)
    for name, one, other in zip(["", "labels", *triggers.ZOO], direct, recovered, strict=True):
        assert torch.equal(one, other), name
    changed = [not torch.equal(direct[0], images) for images in direct[2:]]
    assert all(changed)


@pytest.mark.parametrize(
    ("more", "normalize"),
    [
        ({"shuffle": True}, NORMALIZE),
        ({"augment": "cifar"}, NORMALIZE),
        ({"drop_last": True}, NORMALIZE),
        ({"resident": False}, NORMALIZE),
        ({"trigger": triggers.BadNets(), "poisoned": 0.5}, NORMALIZE),
        ({}, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.26))),
    ],
)
def test_what_is_not_the_stored_images_in_order_goes_the_ordinary_way(more, normalize, monkeypatch):
    taken = ways(monkeypatch)
    shown(loader_of(**more), [triggers.BadNets()], normalize)
    assert taken == ["_from_loader"]


@pytest.fixture
def at_once(monkeypatch):
    """As on a GPU, where small batches are joined."""

    def joined(rows):
        monkeypatch.setattr(triggered_batches, "rows_at_once", lambda image, device: rows)

    return joined


def sizes(loader, normalize=NORMALIZE):
    batches = Batches(loader, 1, "here", at_once=True)
    return [len(x) for x, _, _ in triggered_batches.show(batches, [], normalize, CPU)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, [4, 4, 3]), (3, [4, 4, 3]), (7, [4, 4, 3]), (8, [8, 3]), (10, [8, 3]), (100, [11])],
)
def test_small_batches_are_joined(rows, expected, at_once):
    at_once(rows)
    assert sizes(lambda: loader_of()) == expected


@pytest.mark.parametrize("more", [{"shuffle": True}, {"drop_last": True}, {"augment": "cifar"}])
def test_resident_bytes_are_asked_for_large_batches(more, at_once, monkeypatch):
    named = [triggers.BadNets(), triggers.get("wanet")]
    plain = shown(loader_of(**more), named)
    asked = []
    gather = DeviceLoader.gather
    monkeypatch.setattr(
        DeviceLoader,
        "gather",
        lambda self, rows, **more: asked.append(len(rows)) or gather(self, rows, **more),
    )
    at_once(6)
    large = shown(loader_of(**more), named)
    # The first batch was opened to see whether there is one.
    assert asked == ([4, 6, 2] if "drop_last" in more else [4, 6, 5])
    for one, other in zip(plain, large, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("more", [{}, {"resident": False}])
def test_joined_batches_are_the_same_images(more, at_once):
    named = [triggers.get(name) for name in ("badnets", "wanet", "blended")]
    plain = shown(lambda: loader_of(**more), named)
    at_once(9)
    joined = shown(lambda: loader_of(**more), named)
    for one, other in zip(plain, joined, strict=True):
        assert torch.equal(one, other)


def test_batches_that_differ_are_not_joined(at_once):
    at_once(100)
    images = [(2, 3, 8, 8), (2, 3, 8, 8), (3, 3, 9, 9), (1, 3, 9, 9)]
    batches = [(torch.zeros(*size), torch.zeros(size[0], dtype=torch.long)) for size in images]
    batches.append(
        (torch.zeros(1, 3, 9, 9, dtype=torch.float64), torch.zeros(1, dtype=torch.int32))
    )
    assert sizes(batches) == [4, 4, 1]


def test_a_batch_that_does_not_fit_begins_the_next(at_once):
    at_once(8)
    counts = (2, 7, 1, 3)
    batches = [(torch.zeros(n, 3, 8, 8), torch.zeros(n, dtype=torch.long)) for n in counts]
    assert sizes(batches) == [2, 7, 4]


def test_only_a_gpu_is_given_large_batches():
    image = torch.zeros(3, 32, 32)
    assert triggered_batches.rows_at_once(image, CPU) == 0
    assert triggered_batches.rows_at_once(image, torch.device("cuda")) >= 1024


def test_the_metrics_are_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    named = {name: triggers.get(name) for name in ("badnets", "blended", "wanet", "ftrojan")}
    one = evaluate(model, loader_of(), named, device="cpu")
    other = evaluate(model, lambda: loader_of(), named, normalize=NORMALIZE, device="cpu")
    assert one == other
