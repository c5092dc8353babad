"""What users pass in: every loader that works is taken whole, every bad batch is told in words."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fst_fast import DeviceLoader
from fst_fast.data.batches import (
    Batches,
    check_batch,
    memory_layout,
    native_bf16,
    resolve_device,
    resolve_precision,
)

CPU = torch.device("cpu")
META = torch.device("meta")
IMAGES = torch.arange(10.0).view(10, 1, 1, 1) / 10
LABELS = torch.arange(10)
PAIRS = list(zip(IMAGES.split(4), LABELS.split(4), strict=True))


def labels_of(batches):
    return torch.cat([labels for _, labels in batches]).tolist()


def device_loader():
    return DeviceLoader(torch.zeros(10, 2, 2, 3, dtype=torch.uint8), LABELS, 4, shuffle=False)


class SetEpoch(list):
    """A list of batches that records which epochs it is asked for."""

    def __init__(self, batches):
        super().__init__(batches)
        self.asked = []

    def set_epoch(self, epoch):
        self.asked.append(epoch)


REPEATABLE = {
    "list": lambda: PAIRS,
    "tuple": lambda: tuple(PAIRS),
    "DataLoader": lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4),
    "DeviceLoader": device_loader,
    "generator function": lambda: lambda: (pair for pair in PAIRS),
    "function to a list": lambda: lambda: PAIRS,
    "set_epoch": lambda: SetEpoch(PAIRS),
}


@pytest.mark.parametrize("make", REPEATABLE.values(), ids=REPEATABLE)
def test_every_epoch_of_a_repeatable_loader_is_whole(make):
    batches = Batches(make(), 3, "here: loader")
    assert batches.first[1].tolist() == [0, 1, 2, 3]
    for epoch in range(3):
        assert labels_of(batches.epoch(epoch)) == list(range(10))


@pytest.mark.parametrize("make", [lambda: iter(PAIRS), lambda: (p for p in PAIRS)])
def test_a_one_shot_iterator_is_taken_whole_for_one_epoch(make):
    batches = Batches(make(), 1, "here: loader")
    assert batches.first[1].tolist() == [0, 1, 2, 3]
    assert labels_of(batches.epoch(0)) == list(range(10))


@pytest.mark.parametrize("epochs", [2, 10])
def test_a_one_shot_iterator_is_refused_for_more_epochs(epochs):
    with pytest.raises(
        ValueError, match=rf"here: loader .*\({epochs} times\), got .* generator.*pass"
    ):
        Batches((p for p in PAIRS), epochs, "here: loader")


EMPTY = {
    "list": [],
    "iterator": iter([]),
    "function": lambda: iter([]),
    "DataLoader": DataLoader(TensorDataset(IMAGES[:0], LABELS[:0]), batch_size=4),
    "drop_last": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=11, drop_last=True),
}


@pytest.mark.parametrize("loader", EMPTY.values(), ids=EMPTY)
def test_an_empty_loader_is_refused(loader):
    with pytest.raises(ValueError, match=r"here: loader must yield at least one .*drop_last"):
        Batches(loader, 1, "here: loader")


@pytest.mark.parametrize(
    ("loader", "got"),
    [
        (5, "int"),
        (None, "NoneType"),
        (TensorDataset(IMAGES, LABELS), "TensorDataset"),
        (lambda: 5, "int"),
    ],
    ids=["int", "None", "dataset", "function"],
)
def test_what_cannot_be_iterated_is_refused(loader, got):
    with pytest.raises(ValueError, match=f"here: loader must be an iterable .* got {got}; wrap"):
        Batches(loader, 1, "here: loader")


def test_set_epoch_is_called_before_each_epoch():
    loader = SetEpoch(PAIRS)
    batches = Batches(loader, 3, "here: loader")
    loader.asked.clear()
    for epoch in (0, 1, 2, 1):
        batches.epoch(epoch)
    assert loader.asked == [0, 1, 2, 1]


def test_a_device_loader_gives_the_epoch_that_is_asked_for():
    loader = DeviceLoader(torch.zeros(40, 2, 2, 3, dtype=torch.uint8), torch.arange(40), 16)
    direct = [labels_of(loader) for _ in range(3)]
    batches = Batches(loader, 3, "here: loader")
    assert [labels_of(batches.epoch(epoch)) for epoch in (2, 0, 1)] == [direct[2], *direct[:2]]


def good(count=4):
    return torch.rand(count, 3, 5, 5), torch.arange(count)


def spoiled(value):
    images, labels = good()
    images[2, 1, 3, 4] = value
    return images, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.uint8, torch.uint16])
def test_a_good_batch_is_returned_as_it_is(dtype, label_dtype):
    images, labels = good()
    images, labels = images.to(dtype), labels.to(label_dtype)
    for batch in ((images, labels), [images, labels], (images, labels, "path", 3)):
        got = check_batch(batch, "here: loader", CPU, num_classes=4)
        assert got[0] is images
        assert got[1] is labels


def test_large_and_cancelling_finite_values_are_no_nan():
    images = torch.full((1, 1, 2, 2), 3e38)
    check_batch((images, torch.tensor([0])), "here", CPU)
    check_batch((images.double() * 5e269, torch.tensor([0])), "here", CPU)  # the sum overflows


IMAGES_4, LABELS_4 = good()
BAD = {
    "dict": (
        {"pictures": IMAGES_4, "labels": LABELS_4},
        r"yield \(images, labels\), got a dict of pictures, labels; adapt it: .*pixel_values",
    ),
    "tensor": (IMAGES_4, r"yield \(images, labels\), got torch.float32 \[4, 3, 5, 5\]; .*labels"),
    "one-tuple": ((IMAGES_4,), r"got tuple of 1; .*labels"),
    "uint8 images": (
        (IMAGES_4.to(torch.uint8), LABELS_4),
        r"float tensor \[B, C, H, W\].* got torch.uint8 \[4, 3, 5, 5\]; .*DeviceLoader",
    ),
    "3-D images": ((IMAGES_4[0], LABELS_4), r"\[B, C, H, W\].* got torch.float32 \[3, 5, 5\]"),
    "NumPy images": ((IMAGES_4.numpy(), LABELS_4), "float tensor.* got ndarray"),
    "no images": ((IMAGES_4[:0], LABELS_4[:0]), r"at least one image, got .* \[0, 3, 5, 5\]"),
    "NaN": (spoiled(float("nan")), r"finite images, got nan at .* \[2, 1, 3, 4\] .*normalisation"),
    "Inf": (spoiled(float("inf")), r"finite images, got inf at .* \[2, 1, 3, 4\]"),
    "-Inf": (spoiled(-float("inf")), r"finite images, got -inf at .* \[2, 1, 3, 4\]"),
    "float labels": (
        (IMAGES_4, LABELS_4.float()),
        r"integer class indices \[4\].* got torch.float32 \[4\]; pass labels.long\(\)",
    ),
    "bool labels": (
        (IMAGES_4, LABELS_4 > 1),
        r"integer class indices \[4\].* got torch.bool \[4\]; pass labels.long\(\)",
    ),
    "one-hot labels": (
        (IMAGES_4, torch.eye(4).long()),
        r"got torch.int64 \[4, 4\]; one-hot or soft labels: pass labels.argmax\(dim=1\)",
    ),
    "soft labels": (
        (IMAGES_4, torch.rand(4, 10)),
        r"got torch.float32 \[4, 10\]; one-hot or soft labels: pass labels.argmax\(dim=1\)",
    ),
    "column of labels": (
        (IMAGES_4, LABELS_4[:, None]),
        r"got torch.int64 \[4, 1\]; pass labels.flatten\(\)",
    ),
    "list of labels": ((IMAGES_4, [0, 1, 2, 3]), "integer class indices .* got list of 4"),
    "too few labels": (
        (IMAGES_4, LABELS_4[:3]),
        r"integer class indices \[4\], one per image, got torch.int64 \[3\]",
    ),
    "label too high": (
        (IMAGES_4, torch.tensor([0, 10, 3, 57])),
        r"labels in 0..9 \(the head has 10 classes\), got 57; check the label mapping",
    ),
    "first label too high": ((IMAGES_4, torch.tensor([0, 10, 3, 4])), "0..9 .* got 10;"),
    "negative label": ((IMAGES_4, torch.tensor([0, 2, -1, 3])), "labels in 0..9 .* got -1;"),
    "uint16 label too high": (
        (IMAGES_4, torch.tensor([0, 2, 700, 3]).to(torch.uint16)),
        "labels in 0..9 .* got 700;",
    ),
    "another device": (
        (IMAGES_4.to("meta"), LABELS_4),
        "on cpu or cpu, where the model is, got meta; .*move the loader",
    ),
}


@pytest.mark.parametrize(("batch", "message"), BAD.values(), ids=BAD)
def test_a_bad_batch_is_told_in_words(batch, message):
    with pytest.raises(ValueError, match=message) as told:
        check_batch(batch, "here: loader", CPU, num_classes=10)
    assert str(told.value).startswith("here: loader must yield ")


def test_a_device_tensor_is_not_read():
    """Any look into a tensor on the meta device raises, as one on a GPU would wait for it."""
    images, labels = (t.to("meta") for t in good())
    assert check_batch((images, labels), "here", META, values=True)[0] is images
    assert check_batch((images, labels), "here", META, num_classes=4, values=True)[1] is labels


def test_images_on_the_cpu_are_taken_for_any_device_and_looked_into_where_asked():
    assert check_batch(good(), "here", META)[0].device == CPU
    check_batch(spoiled(float("nan")), "here", CPU, values=False)
    with pytest.raises(ValueError, match="finite"):
        check_batch(spoiled(float("nan")), "here", META)


def test_devices():
    model = nn.Linear(2, 2)
    assert resolve_device("cpu", model) == CPU
    assert resolve_device(CPU, model) == CPU
    with pytest.raises(ValueError, match=r"device must be .* got 'nonsense'.*use device="):
        resolve_device("nonsense", model)
    with pytest.raises(ValueError, match=r"device must be .* got 3.5"):
        resolve_device(3.5, model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_without_a_gpu():
    assert resolve_device(None, nn.Linear(2, 2)) == CPU
    assert resolve_device(None, nn.ReLU()) == CPU
    for name in ("cuda", "cuda:1", "hpu", "mps"):
        with pytest.raises(
            ValueError, match=f"this machine has, got '{name}'.*leave it out"
        ) as told:
            resolve_device(name, nn.Linear(2, 2))
        assert len(str(told.value)) < 400  # PyTorch's own words on "mps" fill a screen


def test_precisions():
    assert resolve_precision("auto", CPU) == ("bf16" if native_bf16() else "fp32")
    assert resolve_precision("auto", CPU, torch.float64) == "fp32"
    for device, name in itertools.product((CPU, torch.device("cuda")), ("fp32", "bf16", "fp16")):
        assert resolve_precision(name, device) == name
    for wrong in ("float16", "FP32", None):
        with pytest.raises(ValueError, match=r"precision must be one of \['auto', 'fp32', 'bf16'"):
            resolve_precision(wrong, CPU)


class Flat(nn.Module):
    """A convolution, then its features in one row, by view or by flatten."""

    def __init__(self, by, channels):
        super().__init__()
        self.by = by
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.head = nn.Linear(8 * 5 * 5, 4)

    def forward(self, x):
        x = self.conv(x)
        return self.head(x.view(len(x), -1) if self.by == "view" else x.flatten(1))


@pytest.mark.parametrize("stored", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("by", "expected"), [("view", torch.contiguous_format), ("flatten", torch.channels_last)]
)
def test_the_layout_is_one_that_the_model_takes(by, expected, batch, stored):
    model = Flat(by, 3).eval()
    images = torch.rand(batch, 3, 5, 5).contiguous(memory_format=stored)
    assert memory_layout(model, images) == expected
    model(images.contiguous(memory_format=expected))


def test_the_layout_of_one_channel_depends_on_the_weights():
    images = torch.rand(4, 1, 5, 5)
    model = Flat("view", 1).eval().to(memory_format=torch.channels_last)
    layout = memory_layout(model, images)
    model.to(memory_format=layout)(images.contiguous(memory_format=layout))


def test_looking_for_the_layout_takes_two_images_and_no_gradient():
    seen = []
    model = Flat("flatten", 3).eval()
    model.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].shape, output)))
    memory_layout(model, torch.rand(9, 3, 5, 5))
    ((shape, output),) = seen
    assert shape[0] == 2
    assert not output.requires_grad
