"""Several steps in one graph end where steps run one by one do, and stop where those stop."""

import functools
import signal

import pytest
import torch
from purify_cases import CLASSES, assert_same_run, make_batches, make_model, quick
from recorder import Recorder, stand_in
from test_resume_within import where
from torch import nn

import fst_fast
from fst_fast.tuning import cuda_graphs, step
from fst_fast.tuning.nonfinite import Guard

# Of 47 images by 4: eleven equal steps in a row, and an odd one. By steps in a graph at most: how
# many there are, and the launches of an epoch.
IN_ONE = {1: 1, 2: 2, 3: 3, 5: 5, 16: 11}
LAUNCHES = {1: 11 + 1, 2: 5 + 1 + 1, 3: 3 + 2 + 1, 5: 2 + 1 + 1, 16: 1 + 1}
# In a first epoch the first of the eleven and the odd one run as they are, the others one by one.
FIRST = 10
# Where there is but one epoch, the ten that are left may be in graphs of several.
ONLY_IN_ONE = {**IN_ONE, 16: 10}
ONLY = {1: 10, 2: 5, 3: 3 + 1, 5: 2, 16: 1}


@pytest.fixture
def recorder(monkeypatch):
    return stand_in(monkeypatch, Recorder())


def loader(augment="cifar"):
    images = torch.randint(0, 256, (47, 8, 8, 3), generator=torch.Generator().manual_seed(4))
    labels = torch.arange(47) % CLASSES
    return fst_fast.DeviceLoader(images.to(torch.uint8), labels, 4, seed=3, augment=augment)


def in_list():
    images, labels = make_batches(1, size=47)[0]
    return list(zip(images.split(4), labels.split(4), strict=True))


# Loader, settings, and the epochs of each phase, in which the same is trained.
RUNS = {
    "resident, fst": (loader, {"alpha": 0.1}, [2]),
    "resident, auto": (loader, {"method": "fst_auto", "epochs": 1}, [1, 3]),
    "resident, ft": (loader, {"method": "ft", "epochs": 1}, [1]),
    "resident, fe": (loader, {"method": "fe", "epochs": 1}, [1]),
    "resident, lp": (loader, {"method": "lp", "epochs": 1}, [1]),
    "features, lp": (functools.partial(loader, augment=None), {"method": "lp"}, [2]),
    "features of a list, lp": (in_list, {"method": "lp"}, [2]),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_bits_however_many_steps_a_graph_holds(name, monkeypatch):
    batches, settings, phases = RUNS[name]
    plain = quick(make_model(), batches(), graphs=False, **settings)
    assert plain.settings["graphs"] is False
    for most in IN_ONE:
        recorder = stand_in(monkeypatch, Recorder())
        replayed = quick(make_model(), batches(), graphs=most, **settings)
        assert_same_run(replayed, plain)
        steps = max((ONLY_IN_ONE if epochs == 1 else IN_ONE)[most] for epochs in phases)
        assert replayed.settings["graphs"] == steps
        # The odd batch's graph holds one step, and is made where it comes again.
        several = len(phases) if most > 1 else 0
        assert recorder.records == len(phases) + several + sum(n > 1 for n in phases)
        assert recorder.warm_ups == 2 * len(phases)
        assert recorder.replays == sum(
            ONLY[most] if epochs == 1 else FIRST + (epochs - 1) * LAUNCHES[most]
            for epochs in phases
        )


def test_with_a_loss_scale(recorder):
    """With fp16 it overflows at first: those steps of a graph are skipped by the device."""
    runs = [
        quick(make_model(), loader(), alpha=0.1, precision="fp16", graphs=on) for on in (5, False)
    ]
    assert_same_run(*runs)


def test_random_numbers_of_the_device_go_on(recorder):
    """Dropout draws in every step of a graph, and recording must not have drawn."""
    model = make_model()
    model.insert(4, nn.Dropout(0.5))
    runs = [quick(model, loader(), alpha=0.1, graphs=most) for most in (3, 16, False)]
    assert_same_run(runs[0], runs[2])
    assert_same_run(runs[1], runs[2])


def test_a_head_that_steps_with_a_deferred_factor(recorder, monkeypatch):
    monkeypatch.setattr(step, "DEFERRED_FROM", 1)
    assert_same_run(*(quick(make_model(), loader(), alpha=0.1, graphs=most) for most in (5, False)))


class Spoils(nn.Module):
    """The n-th step's images, counted on the device, become NaN."""

    def __init__(self, at):
        super().__init__()
        self.net, self.at = make_model(), at
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.steps += 1
        return self.net(torch.where(self.steps == self.at, torch.nan, x))


# Of an epoch's twelve: within a graph, the first of one, left over, and the odd one.
@pytest.mark.parametrize("at", [2, 4, 11, 12])
def test_a_fault_within_a_graph_is_told_to_the_step(at, recorder, monkeypatch):
    plain = quick(Spoils(12 + at), loader(), graphs=False, alpha=0.1, epochs=3)
    for most, lag in ((3, 0), (3, 32), (16, 5)):
        monkeypatch.setattr(step, "Guard", functools.partial(Guard, lag=lag))
        replayed = quick(Spoils(12 + at), loader(), graphs=most, alpha=0.1, epochs=3)
        assert f"not finite at epoch 2, step {at};" in replayed.stopped
        assert_same_run(replayed, plain)


def test_the_guard_hears_of_every_step(recorder, monkeypatch):
    """So that the host stays within its steps ahead, however many a graph holds."""
    told = []

    class Listening(Guard):
        def after_step(self, steps=1):
            told.append(steps)
            return super().after_step(steps)

    monkeypatch.setattr(step, "Guard", Listening)
    quick(make_model(), loader(), alpha=0.1, epochs=2, graphs=3)
    assert told == [1] * 12 + [3, 3, 3, 1, 1, 1]


def test_features_that_are_not_finite_are_told_to_the_batch(recorder):
    batches = in_list()
    # Finite, and too much for the convolution.
    batches[6] = (batches[6][0] * 1e38, batches[6][1])
    for most in (3, 16):
        with pytest.raises(ValueError, match=r"finite images, got NaN or Inf at epoch 1, step 7;"):
            quick(make_model(), batches, method="lp", graphs=most)
    assert recorder.records > 0


def with_dropout():
    model = make_model()
    model.insert(4, nn.Dropout(0.3))
    return model


@pytest.mark.parametrize("launch", [1, 2, 5, 6])
def test_goes_on_behind_an_interruption_within_a_graph(launch, recorder, tmp_path):
    """Ctrl-C while three steps run ends behind the third; another number goes on from there."""
    settings = {"alpha": 0.1, "epochs": 3}
    whole = quick(with_dropout(), loader(), graphs=False, **settings)

    def interrupt(number):
        if number == FIRST + launch:
            signal.raise_signal(signal.SIGINT)

    recorder.at_replay = interrupt
    ended = quick(with_dropout(), loader(), graphs=3, resume=tmp_path, **settings)
    # Launches of 3, 3, 3, 1, 1, and 1 step.
    steps = {1: 3, 2: 6, 5: 11, 6: 12}[launch]
    assert ended.stopped == f"interrupted at epoch 2, step {steps}"
    assert where(tmp_path) == (1, (steps, min(4 * steps, 47)))
    recorder.at_replay, recorder.replays = lambda number: None, 0
    again = quick(with_dropout(), loader(), graphs=5, resume=tmp_path, **settings)
    assert_same_run(again, whole)
    # One by one to the epoch's end.
    # The first of each kind runs as it is, in the epoch that goes on or in the last one.
    assert recorder.replays == {3: 7 + LAUNCHES[5], 6: 4 + LAUNCHES[5], 11: 2 + 1, 12: 2}[steps]


class Cramped(Recorder):
    """Has no room for a second recording."""

    def record(self, function):
        if self.records == 1:
            self.records += 1
            function()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().record(function)


def test_too_much_for_several_steps_goes_one_by_one(monkeypatch, capsys):
    recorder = stand_in(monkeypatch, Cramped())
    replayed = quick(with_dropout(), loader(), alpha=0.1, graphs=5, progress=True)
    assert_same_run(replayed, quick(with_dropout(), loader(), alpha=0.1, graphs=False))
    assert replayed.settings["graphs"] == 1
    assert recorder.replays == 2 * 12 - 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("replays one step at a time: OutOfMemoryError: CUDA out of memory") == 1


def test_batches_that_the_host_stages_go_one_by_one(recorder):
    runs = [quick(make_model(), in_list(), alpha=0.1, graphs=most) for most in (16, False)]
    assert_same_run(*runs)
    assert runs[0].settings["graphs"] == 1
    assert recorder.replays == 2 * 12 - 2


def test_ever_new_sizes_are_not_all_recorded(recorder):
    images, labels = make_batches(1, size=40)[0]
    sizes = range(2, 2 + cuda_graphs.MOST_GRAPHS + 3)
    batches = [(images[:n], labels[:n]) for n in sizes for _ in range(2)]
    runs = [quick(make_model(), batches, method="lp", epochs=2, graphs=on) for on in (2, False)]
    assert_same_run(*runs)
    assert recorder.records == 2 * cuda_graphs.MOST_GRAPHS
    assert recorder.replays == 2 * cuda_graphs.MOST_GRAPHS


@pytest.mark.parametrize(
    ("launch_seconds", "step_seconds", "steps"),
    [(1.0, 0.0, 11), (1.0, 1.0, 1), (1e-9, 0.0, 1)],
    ids=["short and many", "long", "few"],
)
def test_left_to_itself_it_joins_short_steps(
    launch_seconds, step_seconds, steps, recorder, monkeypatch
):
    monkeypatch.setattr(cuda_graphs, "LAUNCH_SECONDS", launch_seconds)
    recorder.step_seconds = step_seconds
    runs = [quick(with_dropout(), loader(), alpha=0.1, graphs=on) for on in ("auto", False)]
    assert_same_run(*runs)
    assert runs[0].settings["graphs"] == steps
    # A first time and a second; where nothing is to be gained, none.
    assert recorder.timings == (0 if launch_seconds < 1 else 2)


def test_a_graph_of_several_must_save_what_it_takes():
    # 400 launches of 10 us are saved, and each step takes 1 ms to record.
    assert cuda_graphs.steps_worth_it(1e-3, 400) == 4
    assert cuda_graphs.steps_worth_it(1e-3, 99) == 1
    assert cuda_graphs.steps_worth_it(1e-3, 10**6) == cuda_graphs.MOST_STEPS


def test_so_many_steps_that_launches_are_fewest():
    assert cuda_graphs.steps_in_one(19, 16) == 9
    assert cuda_graphs.steps_in_one(7, 16) == 7
    assert cuda_graphs.steps_in_one(32, 16) == 16
    assert cuda_graphs.steps_in_one(39, 6) == 6
    assert cuda_graphs.steps_in_one(1, 16) == 1
    for in_a_row in range(1, 70):
        for most in range(1, 17):
            steps = cuda_graphs.steps_in_one(in_a_row, most)
            launches = in_a_row // steps + in_a_row % steps
            assert launches == min(in_a_row // n + in_a_row % n for n in range(1, most + 1))


@pytest.mark.parametrize("wrong", [0, 17, -1, "16", 2.5, None])
def test_a_number_that_is_none(wrong):
    with pytest.raises(ValueError, match=r"True, False or a number of steps in 1..16, got"):
        quick(make_model(), loader(), graphs=wrong)


def test_a_number_needs_a_gpu():
    with pytest.raises(ValueError, match=r"graphs=4 needs a GPU, got the device cpu; leave"):
        quick(make_model(), loader(), graphs=4)
