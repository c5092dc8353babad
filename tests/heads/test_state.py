"""What is changed for a while is put back, also after an exception."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from fst_fast.heads import contexts
from fst_fast.heads.contexts import deterministic_algorithms, evaluating, seeded, tuning

CPU = torch.device("cpu")


class StopError(Exception):
    """Raised inside a block to leave it early."""


@contextlib.contextmanager
def left(by):
    """Run the block, then raise in it, or not."""
    if by == "end":
        yield
    else:
        with pytest.raises(StopError):
            yield


def leave(by):
    if by == "exception":
        raise StopError


both_ways = pytest.mark.parametrize("by", ["end", "exception"])


def draws():
    """One draw from each of the global generators."""
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002


@both_ways
def test_random_states_are_put_back(by):
    for seed_all in (torch.manual_seed, np.random.seed, random.seed):
        seed_all(7)
    torch.rand(1)  # so that the state is no freshly seeded one
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    expected = draws()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])
    with left(by), seeded(3, CPU):
        inside = draws()
        leave(by)
    assert draws() == expected != inside


def test_the_seed_decides_every_draw():
    seen = []
    for seed in (3, 3, 4, 2**62):  # NumPy itself takes 32 bits only
        torch.rand(1)
        with seeded(seed, CPU):
            seen.append(draws())
    assert seen[0] == seen[1]
    for one, other in zip(seen[0], seen[2], strict=True):
        assert one != other


def test_seeding_for_the_cpu_leaves_every_gpu_alone(monkeypatch):
    asked = []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, asked.append)
    with seeded(3, CPU):
        pass
    assert asked == []


def make_model():
    """In train mode, but for a batch norm that was frozen."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout()), nn.Conv2d(4, 4, 3)
    )
    model.train()
    model[1][0].eval()
    model[0].weight.requires_grad_(False)
    return model


def modes(model):
    return [module.training for module in model.modules()]


def flags(model):
    return [parameter.requires_grad for parameter in model.parameters()]


@both_ways
def test_evaluating_puts_each_modules_mode_back(by):
    model = make_model()
    before = modes(model)
    assert set(before) == {True, False}
    with left(by), evaluating(model, CPU):
        assert not any(modes(model))
        leave(by)
    assert modes(model) == before
    assert flags(model) == [False, True, True, True, True, True]


@both_ways
def test_tuning_puts_flags_back_and_drops_gradients(by):
    model = make_model()
    before = flags(model)
    with left(by), tuning(model, CPU):
        assert not any(modes(model))
        for parameter in model.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
        model.train()
        model(torch.rand(2, 3, 8, 8)).sum().backward()
        leave(by)
    assert flags(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(modes(model))


@both_ways
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tuning_puts_the_layout_back(layout, by):
    model = make_model().to(memory_format=layout)
    before = [parameter.stride() for parameter in model.parameters()]
    values = [parameter.detach().clone() for parameter in model.parameters()]
    with left(by), tuning(model, CPU):
        model.to(memory_format=torch.channels_last)
        leave(by)
    assert [parameter.stride() for parameter in model.parameters()] == before
    for parameter, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(parameter, value)


class Travelling(nn.Linear):
    """Notes where it is sent instead of going there."""

    def __init__(self):
        super().__init__(2, 2)
        self.went = []
        self.refuses = False

    def to(self, *args, **kwargs):
        if args:
            self.went.append(str(args[0]))
            if self.refuses and str(args[0]) != "cpu":
                raise StopError
        return self


@pytest.fixture
def no_gpu_needed(monkeypatch):
    monkeypatch.setattr(contexts, "on_device", lambda device: contextlib.nullcontext())


@both_ways
@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.parametrize("manager", [evaluating, tuning])
def test_the_device_is_put_back(manager, by):
    model = Travelling()
    with left(by), manager(model, torch.device("cuda:1")):
        leave(by)
    assert model.went == ["cuda:1", "cpu"]


@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.parametrize("manager", [evaluating, tuning])
def test_a_model_that_did_not_fit_the_device_is_brought_back(manager):
    model = Travelling()
    model.refuses = True
    with pytest.raises(StopError), manager(model, torch.device("cuda:1")):
        pass
    assert model.went == ["cuda:1", "cpu"]


def test_tuning_leaves_a_model_on_the_meta_device_there():
    model = make_model().to("meta")
    with tuning(model, CPU):
        assert all(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_deterministic_algorithms_are_put_back():
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
    )
    with deterministic_algorithms(True), pytest.raises(RuntimeError, match="deterministic impl"):
        # One of the operations that PyTorch has no such algorithm for.
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    after = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
    )
    assert after == before
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
