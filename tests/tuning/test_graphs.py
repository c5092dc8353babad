"""Recorded and replayed steps end where steps run one by one do; what cannot be recorded is not."""

import random

import numpy as np
import pytest
import torch
from purify_cases import CLASSES, assert_same_run, make_batches, make_model, quick
from recorder import Recorder, stand_in
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fst_fast
from fst_fast.ops import backends
from fst_fast.tuning import cuda_graphs, step


@pytest.fixture
def recorder(monkeypatch):
    return stand_in(monkeypatch, Recorder())


def uneven():
    """Batches of 8, 8 and 5."""
    images, labels = make_batches(1, size=21)[0]
    return list(zip(images.split(8), labels.split(8), strict=True))


def data_loader():
    images, labels = make_batches(1, size=21)[0]
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(images, labels), 8, shuffle=True, generator=generator)


def device_loader(**more):
    images = torch.randint(0, 256, (21, 8, 8, 3), generator=torch.Generator().manual_seed(4))
    return fst_fast.DeviceLoader(
        *(images.to(torch.uint8), torch.arange(21) % CLASSES, 8), seed=3, **more
    )


LOADERS = {
    "list": uneven,
    "DataLoader": data_loader,
    "DeviceLoader": lambda: device_loader(augment="cifar"),
    "DeviceLoader, poisoned": lambda: device_loader(
        augment="cifar", trigger=fst_fast.triggers.BadNets(), poisoned=0.3
    ),
}
# Settings, and how many kinds of steps there are: of each size, and with the head alone.
METHODS = {
    "fst": ({"alpha": 0.1}, 2),
    "auto": ({"method": "fst_auto"}, 4),
    "ft": ({"method": "ft"}, 2),
    "fe": ({"method": "fe"}, 2),
    "lp": ({"method": "lp"}, 2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loader", LOADERS)
def test_replayed_steps_end_in_the_same_bits(loader, method, recorder):
    settings, kinds = METHODS[method]
    replayed = quick(make_model(), LOADERS[loader](), epochs=4, **settings)
    plain = quick(make_model(), LOADERS[loader](), epochs=4, graphs=False, **settings)
    assert_same_run(replayed, plain)
    if "poisoned" in loader and not backends.report()["cpu"]["available"]:
        # The reference of inject reads which rows carry a trigger.
        assert recorder.replays == 0
        return
    assert recorder.records == kinds
    assert recorder.warm_ups == kinds
    # The first step of a kind runs as it is.
    assert recorder.replays == 3 * len(plain.history) - kinds


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision, recorder):
    """With fp16 the loss scale overflows at first: those steps are skipped by the device."""
    runs = [
        quick(make_model(), uneven(), alpha=0.1, epochs=4, precision=precision, graphs=on)
        for on in ("auto", False)
    ]
    assert_same_run(*runs)
    assert recorder.replays == 12 - 2


def test_a_head_that_steps_with_a_deferred_factor(recorder, monkeypatch):
    monkeypatch.setattr(step, "DEFERRED_FROM", 1)
    runs = [quick(make_model(), uneven(), alpha=0.1, graphs=on) for on in ("auto", False)]
    assert_same_run(*runs)


def test_random_numbers_of_the_device_go_on(recorder):
    """Dropout draws in every step, and warming up must not have drawn."""
    model = make_model()
    model.insert(4, nn.Dropout(0.5))
    runs = [quick(model, uneven(), alpha=0.1, epochs=3, graphs=on) for on in ("auto", False)]
    assert_same_run(*runs)
    assert recorder.replays == 9 - 2


def test_goes_on_behind_an_interruption(recorder, tmp_path):
    whole = quick(make_model(), uneven(), alpha=0.1, epochs=4)

    def stop(record, model):
        return record.epoch == 2

    quick(make_model(), uneven(), alpha=0.1, epochs=4, resume=tmp_path, callbacks=[stop])
    again = quick(make_model(), uneven(), alpha=0.1, epochs=4, resume=tmp_path)
    assert_same_run(again, whole)


def test_ever_new_sizes_are_not_all_recorded(recorder):
    images, labels = make_batches(1, size=40)[0]
    sizes = range(2, 2 + cuda_graphs.MOST_GRAPHS + 3)
    batches = [(images[:n], labels[:n]) for n in sizes]
    runs = [quick(make_model(), batches, alpha=0.1, graphs=on) for on in ("auto", False)]
    assert_same_run(*runs)
    assert recorder.records == cuda_graphs.MOST_GRAPHS
    # In the first of two epochs they run as they are.
    assert recorder.replays == cuda_graphs.MOST_GRAPHS


def test_a_loader_whose_length_changes(recorder):
    def loader():
        lengths.append(len(lengths) % 3 + 1)
        return uneven()[: lengths[-1]]

    runs = []
    for on in ("auto", False):
        lengths = []
        runs.append(quick(make_model(), loader, alpha=0.1, epochs=4, graphs=on))
    assert_same_run(*runs)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_model()
        self.steps = 0

    def forward(self, x):
        return self.net(self.change(x) if self.training else x)


class Reads(Wrapped):
    def change(self, x):
        return x * 0.5 if x.mean().item() > 0 else x


class Counts(Wrapped):
    def change(self, x):
        self.steps += 1
        return x * self.steps


class Draws(Wrapped):
    def change(self, x):
        return x * random.random()


class DrawsFromNumPy(Wrapped):
    def change(self, x):
        return x * float(np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Reads, "waits for the device"),
        (Counts, "Counts.steps changes in Python at every step"),
        (Draws, "draws random numbers from random"),
        (DrawsFromNumPy, "draws random numbers from numpy.random"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(kind, reason, recorder, capsys):
    replayed = quick(kind(), uneven(), alpha=0.1, epochs=3, progress=True)
    told = capsys.readouterr().err
    assert told.count("runs without CUDA graphs") == 1
    assert reason in " ".join(told.split())
    assert recorder.replays == 0
    assert_same_run(replayed, quick(kind(), uneven(), alpha=0.1, epochs=3, graphs=False))
    with pytest.raises(RuntimeError, match=r"graphs=True needs a step that can be recorded"):
        quick(kind(), uneven(), alpha=0.1, graphs=True)


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match=r"graphs=True needs a GPU, got the device cpu"):
        quick(make_model(), uneven(), graphs=True)
    with pytest.raises(ValueError, match=r'graphs must be "auto", True, False or a number'):
        quick(make_model(), uneven(), graphs="always")


def test_the_recorder_itself_runs_no_python():
    """It would prove nothing if it called the function again."""
    calls = []
    tensor, total = torch.ones(3), torch.zeros(())

    def function():
        calls.append(1)
        total.add_((tensor * len(calls)).sum())

    recorder = Recorder()
    replay = recorder.record(function)
    for _ in range(2):
        replay()
    assert len(calls) == 1
    assert total == 9
