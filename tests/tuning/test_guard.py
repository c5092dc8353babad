"""The guard by itself: what it looks at, what it freezes, what it tells."""

import pytest
import torch
from torch import nn

from fst_fast.tuning import cuda_graphs
from fst_fast.tuning.nonfinite import RUN_AHEAD, Fault, Guard
from fst_fast.tuning.run_state import RunState

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def model():
    return nn.BatchNorm1d(3)


def guarded(model, precision="fp32", lag=None):
    state = RunState()
    for name, buffer in model.named_buffers():
        state.add(name, buffer, "buffer")
    return Guard(state, CPU, precision, classes=4, lag=lag)


def batch(value=0.5, label=3):
    return torch.tensor([[0.0, value]]), torch.tensor([0, label])


def do(guard, images=0.5, label=3, loss=1.0, gradient=1.0):
    """One step; returns whether an optimizer would take it."""
    guard.admit(*batch(images, label))
    guard.inspect(torch.tensor(loss), [torch.tensor([1.0, gradient])])
    guard.after_step()
    return guard.found_inf.item() == 0


@pytest.mark.parametrize(
    ("wrong", "images", "labels"),
    [
        ({"loss": NAN}, False, False),
        ({"loss": INF}, False, False),
        ({"gradient": NAN}, False, False),
        ({"gradient": -INF}, False, False),
        ({"loss": NAN, "images": NAN}, True, False),
        ({"loss": INF, "images": -INF}, True, False),
        ({"label": 4}, False, True),
        ({"label": -1}, False, True),
    ],
)
@pytest.mark.parametrize("lag", [0, 5])
def test_freezes_at_the_first_fault_and_tells_it(wrong, images, labels, lag, model):
    guard = guarded(model, lag=lag)
    assert do(guard)
    assert do(guard)
    assert not do(guard, **wrong)
    # Good again, and wrong otherwise: too late for both.
    assert not do(guard)
    assert not do(guard, images=NAN, label=9, loss=NAN)
    assert guard.finish() == Fault(2, images, labels)


def test_nothing_went_wrong(model):
    guard = guarded(model)
    assert guard.finish() is None
    assert do(guard)
    assert guard.finish() is None


def test_labels_come_back_as_classes(model):
    named = guarded(model).admit(torch.zeros(1), torch.tensor([-5, 0, 3, 77]))
    assert named.tolist() == [0, 0, 3, 3]


def test_buffers_are_put_back_to_before_the_fault(model):
    guard = guarded(model, lag=5)
    for step in range(5):
        model.running_mean += 1
        model.num_batches_tracked += 1
        do(guard, loss=NAN if step == 3 else 1.0)
    assert guard.finish().good_steps == 3
    assert model.running_mean.tolist() == [3, 3, 3]
    assert model.num_batches_tracked == 3


def test_a_statistic_that_is_not_finite_is_a_fault(model):
    guard = guarded(model)
    do(guard)
    model.running_var[1] = NAN
    assert not do(guard)
    guard.finish()
    assert model.running_var.tolist() == [1, 1, 1]


def test_what_others_did_to_the_buffers_is_kept(model):
    guard = guarded(model)
    do(guard)
    model.running_mean.fill_(7)
    guard.keep()
    do(guard, loss=NAN)
    model.running_mean.fill_(8)
    # Not after a fault: these are no good ones.
    guard.keep()
    guard.finish()
    assert model.running_mean.tolist() == [7, 7, 7]


def test_with_a_loss_scale_an_overflow_skips_one_step(model):
    guard = guarded(model, "fp16")
    scale = guard.scale.item()
    assert not do(guard, gradient=INF)
    assert guard.scale.item() == scale / 2
    assert do(guard)
    assert guard.finish() is None


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_the_host_looks_so_many_steps_behind(lag, model):
    guard = guarded(model, lag=lag)
    told = []
    for step in range(6):
        guard.inspect(torch.tensor(NAN if step == 1 else 1.0), [])
        told.append(guard.after_step())
    assert told.index(True) == 1 + lag


@pytest.mark.parametrize("together", [1, 3, 8, 16])
def test_the_host_is_no_more_steps_ahead_however_many_are_queued_at_once(together, model):
    """What it has not seen are at most so many steps, of which only the last was looked at."""
    guard, lag = guarded(model, lag=8), 8
    queued, told_after = 0, None
    while told_after is None:
        guard.inspect(torch.tensor(NAN), [])
        queued += together
        if guard.after_step(together):
            told_after = queued
    # Had the first flag not been waited for, more than lag steps would be unseen.
    assert told_after - together <= lag < told_after
    assert guard.finish() == Fault(0, False, False)


def test_behind_many_steps_at_once_the_host_catches_up_with_many_flags(model):
    guard = guarded(model, lag=8)
    told = []
    for step in range(8):
        guard.inspect(torch.tensor(NAN if step == 7 else 1.0), [])
        told.append(guard.after_step())
    assert told == [False] * 8
    # Now the eight are too far back.
    assert guard.after_step(8)


def test_two_graphs_fit_into_what_the_host_may_be_ahead():
    assert 2 * cuda_graphs.MOST_STEPS <= RUN_AHEAD


def test_a_model_without_buffers():
    guard = guarded(nn.Linear(2, 2))
    assert do(guard)
    assert not do(guard, loss=NAN)
    assert guard.finish() == Fault(1, False, False)
