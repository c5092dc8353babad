"""DeviceLoader and triggers: values that look right and are not, and remedies that hold."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fst_fast import DeviceLoader, triggers
from fst_fast.data.normalization import NORMALIZATIONS
from fst_fast.triggers import BadNets
from fst_fast.triggers.pixels import normalize_bytes, pixel_range, recover_bytes

BYTES = torch.randint(
    0, 256, (5, 6, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
BYTES[0, 0, 0], BYTES[0, 0, 1] = 0, 255
LABELS = torch.arange(5)

# Kinds of the same images, in other types and orders.
KINDS = {
    "bytes, channels first": BYTES.permute(0, 3, 1, 2),
    "0..1": BYTES / 255,
    "0..1, channels first": (BYTES / 255).permute(0, 3, 1, 2),
    "0..255": BYTES.float(),
    "0..255, channels first": BYTES.float().permute(0, 3, 1, 2),
    "int64": BYTES.long(),
    "int64, channels first": BYTES.long().permute(0, 3, 1, 2),
}


def remedy(call):
    with pytest.raises(ValueError, match="images must be") as raised:
        call()
    return str(raised.value).rpartition("use ")[2]


@pytest.mark.parametrize("images", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("where", ["DeviceLoader", "trigger"])
def test_the_remedy_gives_back_the_very_bytes(images, where):
    calls = {
        "DeviceLoader": lambda: DeviceLoader(images, LABELS),
        "trigger": lambda: BadNets().apply(images),
    }
    advice = remedy(calls[where])
    assert torch.equal(eval(advice, {"images": images, "torch": torch}), BYTES)


def test_the_remedy_for_normalised_images_undoes_that_first():
    images = normalize_bytes(BYTES, "imagenet")
    with pytest.raises(ValueError, match=r"normalised: undo it, images \* std \+ mean, and then"):
        DeviceLoader(images, LABELS)


@pytest.mark.parametrize("label", [2**31, 2**32 + 3, 2**40, 2**63 - 1])
def test_labels_beyond_int32_are_refused_and_never_wrapped(label):
    labels = torch.tensor([0, 1, label, 2, 3])
    with pytest.raises(ValueError, match=rf"labels must be classes in 0..2147483647, got {label}"):
        DeviceLoader(BYTES, labels)
    largest = torch.tensor([0, 1, 2**31 - 1, 2, 3])
    (_, got), *_ = DeviceLoader(BYTES, largest, shuffle=False)
    assert got.tolist() == largest.tolist()


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "none"])
def test_a_normalisation_goes_by_its_name(name):
    values = NORMALIZATIONS[name]
    named = DeviceLoader(BYTES, LABELS, normalize=name)
    (images, _), *_ = named
    (same, _), *_ = DeviceLoader(BYTES, LABELS, normalize=values)
    assert torch.equal(images, same)
    assert named.normalize == values
    assert torch.equal(recover_bytes(normalize_bytes(BYTES, name), name), BYTES)
    assert pixel_range(normalize_bytes(BYTES, name), name)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("normalize", "message"),
    [
        ("mnist", "or one of none, cifar10, imagenet, got 'mnist'"),
        (5, r"must be \(mean, std\).* got 5"),
        (([0.5] * 3,), r"must be \(mean, std\)"),
        (([0.5] * 3, ["a"] * 3), r"must be \(mean, std\)"),
        (([0.5] * 3, [0.2, 0.0, 0.2]), "standard deviations > 0"),
        (([0.5, float("nan"), 0.5], [0.2] * 3), "finite means"),
    ],
)
def test_a_normalisation_that_is_none_is_refused(normalize, message):
    with pytest.raises(ValueError, match=message):
        DeviceLoader(BYTES, LABELS, normalize=normalize)


def test_numbers_of_numpy_are_numbers():
    loader = DeviceLoader(
        BYTES.numpy(),
        LABELS.numpy(),
        np.int64(2),
        seed=np.uint8(3),
        normalize=(np.full(3, 0.5), np.full(3, 0.2, np.float32)),
        trigger=BadNets(size=np.int64(2), value=np.uint8(9)),
        poisoned=np.float32(0.4),
        target=np.int64(1),
    )
    plain = DeviceLoader(
        BYTES,
        LABELS,
        2,
        seed=3,
        normalize=((0.5,) * 3, (float(np.float32(0.2)),) * 3),
        trigger=BadNets(size=2, value=9),
        poisoned=0.4,
        target=1,
    )
    for (one, a), (other, b) in zip(loader, plain, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(a, b)
    assert torch.equal(loader.mask, plain.mask)


def test_a_mask_of_numpy_chooses_the_poisoned():
    mask = np.array([True, False, True, False, False])
    loader = DeviceLoader(BYTES, LABELS, trigger=BadNets(), poisoned=mask, relabel="clean-label")
    assert loader.mask.tolist() == mask.tolist()


@pytest.mark.parametrize("name", [name for name in triggers.ZOO if name not in
                                  ("siba", "ssba", "poison-ink", "input-aware")])  # fmt: skip
def test_triggers_take_numbers_of_numpy_and_describe_themselves_in_json(name):
    kind = triggers.ZOO[name]
    given = {}
    for field in dataclasses.fields(kind):
        if type(field.default) in (int, float):
            given[field.name] = np.array(field.default)[()]
    assert given
    assert all(isinstance(value, np.generic) for value in given.values())
    assert json.dumps(kind(**given).describe()) == json.dumps(kind().describe())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 2.0}, "batch_size must be an integer >= 1, got 2.0"),
        ({"batch_size": "2"}, "batch_size must be an integer >= 1, got '2'"),
        ({"seed": None}, "seed must be an integer in .*, got None"),
        ({"seed": "0"}, "seed must be an integer in .*, got '0'"),
        ({"device": "gpu"}, "device must be one that this machine has, got 'gpu'"),
        ({"images": [1, "a"]}, r"images must be a tensor or an array, got list"),
        ({"labels": None}, "labels must be a tensor or an array, got NoneType"),
        ({"trigger": "badnets"}, r"must be a Trigger or several, got 'badnets'; fst_fast.trigg"),
        ({"trigger": 5}, "must be a Trigger or several, got 5"),
        ({"trigger": BadNets(), "target": "0"}, r"target must be a class in 0..4, got '0'"),
        ({"trigger": BadNets(), "poisoned": "0.1"}, "poisoned must be .* got '0.1'"),
        ({"trigger": BadNets(), "poisoned": True}, "poisoned must be .* got True"),
        ({"trigger": BadNets(), "cover": None}, "cover must be a rate in 0..1, got None"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_wrong_types_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        DeviceLoader(**{"images": BYTES, "labels": LABELS, **wrong})
