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


def test_the_metrics_are_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    named = {name: triggers.get(name) for name in ("badnets", "blended", "wanet", "ftrojan")}
    one = evaluate(model, loader_of(), named, device="cpu")
    other = evaluate(model, lambda: loader_of(), named, normalize=NORMALIZE, device="cpu")
    assert one == other
