"""Runs that end early: callbacks, Ctrl-C, and a loss that is not finite."""

import copy
import functools
import signal
import threading

import pytest
from purify_cases import (
    equal_states,
    make_batches,
    make_model,
    quick,
    with_value,
)
from recorder import Recorder, stand_in
from torch import nn

from fst_fast.tuning import step


def test_callback_sees_records_and_can_stop():
    seen = []

    def callback(record, model):
        seen.append((record.epoch, isinstance(model, nn.Module)))
        return record.epoch == 2

    result = quick(make_model(), make_batches(), epochs=5, callbacks=[callback])
    assert seen == [(1, True), (2, True)]
    assert len(result.history) == 2
    assert "callback" in result.stopped


def interrupt_at(step, batches):
    count = [0]

    def factory():
        for batch in batches:
            count[0] += 1
            if count[0] == step:
                signal.raise_signal(signal.SIGINT)
            yield batch

    return factory


def test_ctrl_c_returns_what_was_done():
    before = signal.getsignal(signal.SIGINT)
    # The first batch is drawn once more up front, to look at it.
    result = quick(make_model(), interrupt_at(6, make_batches()), epochs=5)
    assert len(result.history) == 1
    assert "interrupted at epoch 2, step 2" in result.stopped
    assert signal.getsignal(signal.SIGINT) is before
    assert result.model[-1].weight.norm().item() == pytest.approx(
        make_model()[-1].weight.norm().item(), rel=1e-5
    )


def test_second_ctrl_c_raises():
    def impatient():
        yield make_batches()[0]
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield make_batches()[0]

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        quick(make_model(), impatient)
    assert signal.getsignal(signal.SIGINT) is before


def test_runs_in_a_thread():
    out = []
    thread = threading.Thread(target=lambda: out.append(quick(make_model(), make_batches())))
    thread.start()
    thread.join()
    assert len(out[0].history) == 2


@pytest.mark.parametrize("graphs", ["auto", False], ids=["replayed", "step by step"])
@pytest.mark.parametrize("lag", [0, 1, 32], ids=["at once", "one step behind", "as on a GPU"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nan_loss_stops_within_one_step_and_keeps_the_last_good_weights(
    precision, lag, graphs, monkeypatch
):
    # Seven good steps of a schedule for 4 epochs; the eighth is not finite.
    monkeypatch.setattr(step, "Guard", functools.partial(step.Guard, lag=lag))
    if graphs == "auto":
        stand_in(monkeypatch, Recorder())
    good, bad = make_batches(), make_batches()
    # Finite, and too much for the first convolution.
    bad[1] = (bad[1][0] * 1e38, bad[1][1])
    epochs = iter([good, good, good, bad, bad])
    result = quick(make_model(), lambda: next(epochs), epochs=4, precision=precision, graphs=graphs)
    assert "not finite at epoch 3, step 2" in result.stopped
    assert [record.epoch for record in result.history] == [1, 2]
    states = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_model()

        def forward(self, x):
            if self.training:
                states.append(copy.deepcopy(self.net.state_dict()))
            return self.net(x)

    quick(Watched(), make_batches(), epochs=4, precision=precision, graphs=False)
    assert equal_states(result.model.state_dict(), states[7])


@pytest.mark.parametrize("lag", [0, 32], ids=["at once", "as on a GPU"])
def test_bad_images_of_a_later_epoch_are_told_as_such(lag, monkeypatch):
    monkeypatch.setattr(step, "Guard", functools.partial(step.Guard, lag=lag))
    good, bad = make_batches(), make_batches()
    bad[2] = (with_value(bad[2][0], float("inf")), bad[2][1])
    epochs = iter([good, good, bad, good])
    with pytest.raises(ValueError, match=r"yield finite images, got NaN or Inf at epoch 2, step 3"):
        quick(make_model(), lambda: next(epochs), epochs=3)


def test_overflowing_gradient_stops_too():
    result = quick(make_model(), make_batches(), lr=1e25, epochs=6)
    assert "not finite" in result.stopped
    assert all(value.isfinite().all() for value in result.model.state_dict().values())
