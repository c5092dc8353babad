"""The public verb: what it returns, what it leaves alone, and what it refuses."""

import copy
import io
import json
import multiprocessing
import random
import signal
import threading

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fst_fast
from fst_fast import methods
from fst_fast.heads import AmbiguousHeadError
from fst_fast.progress import ProgressReport

CLASSES = 4


def make_model(channels=3, classes=CLASSES, **more):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


def make_batches(count=3, size=8, channels=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, channels, 8, 8, generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def quick(model, loader, **more):
    return fst_fast.purify(
        model, loader, **{"epochs": 2, "progress": False, "device": "cpu", **more}
    )


def equal_states(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


# What comes back


def test_result_describes_the_run():
    model = make_model()
    result = quick(model, make_batches(), alpha=0.3, lr=0.02, seed=5)
    assert [record.epoch for record in result.history] == [1, 2]
    assert [record.lr for record in result.history] == pytest.approx([0.02, 0.01])
    last = result.history[-1]
    weight, weight0 = result.model[-1].weight, model[-1].weight
    cosine = nn.functional.cosine_similarity(weight.flatten(), weight0.flatten(), dim=0)
    assert last.cosine == pytest.approx(cosine.item(), abs=1e-5) == result.head_shift.cosine
    assert last.norm == pytest.approx(weight0.norm().item(), rel=1e-5)
    assert 0 <= last.clean_accuracy <= 1
    assert result.stopped is None
    assert result.seconds > 0
    assert result.settings["alpha"] == 0.3
    assert result.settings["seed"] == 5
    assert result.settings["head"] == "5"
    assert result.settings["method"] == "fst"
    json.dumps(dict(result.settings))


def test_default_call_needs_no_argument(capsys):
    result = fst_fast.purify(make_model(), make_batches(2))
    assert len(result.history) == 10
    assert result.settings["alpha"] == 0.2
    assert capsys.readouterr().err.count("epoch") == 10


def test_given_model_is_left_alone():
    model = make_model().train()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    result = quick(model, make_batches())
    assert equal_states(before, model.state_dict())
    assert model.training
    assert not model[0].weight.requires_grad
    assert not result.model.training
    assert not result.model[0].weight.requires_grad
    assert not torch.equal(result.model[0].weight, model[0].weight)
    assert all(p.grad is None for p in result.model.parameters())


def test_inplace_tunes_the_given_model():
    model, other = make_model(), make_model()
    weight = model[-1].weight
    result = quick(model, make_batches(), inplace=True)
    assert result.model is model
    assert model[-1].weight is weight
    assert equal_states(model.state_dict(), quick(other, make_batches()).model.state_dict())


def test_wrapped_model():
    model = make_model()
    wrapped = nn.DataParallel(model)
    plain = quick(model, make_batches())
    assert equal_states(plain.model.state_dict(), quick(wrapped, make_batches()).model.state_dict())
    assert quick(wrapped, make_batches(), inplace=True).model is wrapped


def test_weights_come_back_contiguous_and_channels_last_was_used():
    result = quick(make_model(), make_batches())
    assert result.settings["channels_last"]
    assert result.model[0].weight.is_contiguous()


@pytest.mark.parametrize("channels", [1, 3])
def test_model_that_needs_contiguous_images(channels):
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(channels, 4, 3, padding=1)
            self.fc = nn.Linear(4 * 64, CLASSES)

        def forward(self, x):
            x = torch.relu(self.conv(x))
            return self.fc(x.view(x.size(0), -1))

    result = quick(View(), make_batches(channels=channels))
    assert not result.settings["channels_last"]
    assert result.model.conv.weight.is_contiguous()
    assert len(result.history) == 2


def test_conv_head():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(6, CLASSES, 1),
        nn.Flatten(),
    )
    result = quick(model, make_batches())
    assert result.model[3].weight.norm().item() == pytest.approx(
        model[3].weight.norm().item(), rel=1e-5
    )


# Randomness


def test_same_seed_same_bits_other_seed_other_bits():
    loader = DataLoader(
        TensorDataset(*map(torch.cat, zip(*make_batches(), strict=True))), 8, shuffle=True
    )
    runs = [quick(make_model(), loader, seed=seed).model.state_dict() for seed in (0, 0, 1)]
    assert equal_states(runs[0], runs[1])
    assert not torch.equal(runs[0]["5.weight"], runs[2]["5.weight"])


def test_global_random_state_is_untouched():
    def draw():
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002

    def seed():
        torch.manual_seed(7), random.seed(7), np.random.seed(7)  # noqa: NPY002

    model, batches = make_model(), make_batches()
    seed()
    expected = draw()
    seed()
    quick(model, batches)
    assert draw() == expected


# Loaders


@pytest.mark.parametrize(
    "make",
    [
        lambda data: data,
        lambda data: tuple(data),
        lambda data: lambda: iter(data),
        lambda data: lambda: (batch for batch in data),
        lambda data: DataLoader(TensorDataset(*map(torch.cat, zip(*data, strict=True))), 8),
    ],
    ids=["list", "tuple", "factory", "generator-factory", "DataLoader"],
)
def test_any_iterable_gives_the_same_run(make):
    expected = quick(make_model(), make_batches()).model.state_dict()
    assert equal_states(expected, quick(make_model(), make(make_batches())).model.state_dict())


def test_persistent_workers_are_not_a_one_shot_iterator():
    dataset = TensorDataset(*map(torch.cat, zip(*make_batches(), strict=True)))
    loader = DataLoader(dataset, 8, num_workers=1, persistent_workers=True)
    expected = quick(make_model(), make_batches()).model.state_dict()
    assert equal_states(expected, quick(make_model(), loader).model.state_dict())


def test_no_worker_is_left_behind():
    dataset = TensorDataset(*map(torch.cat, zip(*make_batches(), strict=True)))
    during = []

    def callback(record, model):
        during.append(len(multiprocessing.active_children()))

    quick(make_model(), DataLoader(dataset, 8, num_workers=2), callbacks=[callback])
    assert during == [0, 0]


def test_one_shot_iterator():
    expected = quick(make_model(), make_batches(), epochs=1).model.state_dict()
    got = quick(make_model(), iter(make_batches()), epochs=1).model.state_dict()
    assert equal_states(expected, got)
    with pytest.raises(ValueError, match=r"loader must be iterable once per epoch \(2 times\)"):
        quick(make_model(), iter(make_batches()), epochs=2)


def test_factory_that_runs_dry():
    once = iter(make_batches())
    with pytest.raises(ValueError, match="got a one-shot function"):
        quick(make_model(), lambda: once)
    left = [make_batches(), make_batches(), make_batches()]
    with pytest.raises(ValueError, match="must yield batches in every epoch, got none in epoch 2"):
        quick(make_model(), lambda: iter(left.pop() if left else []))


def test_device_loader():
    images = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8)
    loader = fst_fast.DeviceLoader(images, torch.arange(20) % CLASSES, 8, augment="cifar")
    runs = [quick(make_model(), loader).model.state_dict() for _ in range(2)]
    assert equal_states(*runs)


def test_validation_is_what_the_history_shows():
    model, batches = make_model(), make_batches()
    validation = make_batches(seed=9)
    result = quick(model, batches, validation=validation)
    expected = fst_fast.evaluate(result.model, validation, device="cpu").clean_accuracy
    assert result.history[-1].clean_accuracy == expected
    plain = quick(model, batches)
    assert equal_states(result.model.state_dict(), plain.model.state_dict())


# Precision and backends


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(precision):
    truth = quick(make_model(), make_batches(), precision="fp32")
    result = quick(make_model(), make_batches(), precision=precision)
    assert result.settings["precision"] == precision
    for got, want in zip(result.history, truth.history, strict=True):
        assert got.loss == pytest.approx(want.loss, rel=2e-2)
        assert got.loss != want.loss


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_backends_agree(backend):
    if backend not in fst_fast.backends.available("head_step_", torch.device("cpu")):
        pytest.skip(f"{backend} is not built here")
    truth = quick(make_model().double(), [(x.double(), y) for x, y in make_batches()])
    result = quick(make_model(), make_batches(), backend=backend)
    for key, want in truth.model.state_dict().items():
        torch.testing.assert_close(
            result.model.state_dict()[key].double(), want.double(), rtol=1e-4, atol=1e-5
        )


# Stopping


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


class Poisonable(nn.Module):
    """Its loss becomes NaN from the given training step on."""

    def __init__(self, at):
        super().__init__()
        self.net, self.at, self.step = make_model(), at, 0

    def forward(self, x):
        if self.training:
            self.step += 1
            if self.step == self.at:
                x = x * float("nan")
        return self.net(x)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nan_loss_stops_within_one_step_and_keeps_the_last_good_weights(precision):
    # Seven good steps of a schedule for 4 epochs; the eighth is not finite.
    result = quick(Poisonable(8), make_batches(), epochs=4, precision=precision)
    assert "not finite at epoch 3, step 2" in result.stopped
    assert len(result.history) == 2
    states = []

    class Recorder(Poisonable):
        def forward(self, x):
            if self.training:
                states.append(copy.deepcopy(self.net.state_dict()))
            return super().forward(x)

    quick(Recorder(-1), make_batches(), epochs=4, precision=precision)
    assert equal_states(result.model.net.state_dict(), states[7])


def test_overflowing_gradient_stops_too():
    result = quick(make_model(), make_batches(), lr=1e25, epochs=6)
    assert "not finite" in result.stopped
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


# Refusals


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"method": "fstt"}, r"method must be one of \['fe', 'fst', 'ft', 'ft_init', 'lp'\]"),
        ({"method": 3}, "method must be a name"),
        ({"method": "ft", "alpha": 0.1}, "method 'ft' does not take alpha"),
        ({"method": methods.get("fst"), "alpha": 0.1}, "alpha must be None where method"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"alpha": -1.0}, "alpha must be a finite number"),
        ({"alpha": "auto"}, "not available yet"),
        ({"graphs": True}, "not available yet"),
        ({"resume": "run"}, "not available yet"),
        ({"precision": "fp8"}, r"precision must be one of .* got 'fp8'"),
        ({"backend": "cudnn"}, "backend must be one of reference, cpu, triton, cuda"),
        ({"device": "gpu0"}, "device must be one that this machine has, got 'gpu0'"),
        ({"epochs": 0}, "epochs must be an integer >= 1"),
        ({"lr": 0.0}, "lr must be a finite number > 0"),
        ({"lr": float("inf")}, "lr must be a finite number > 0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"head": "nowhere"}, "head"),
        ({"validation": []}, "purify: validation must yield at least one batch"),
    ],
)
def test_wrong_arguments(more, text):
    with pytest.raises(ValueError, match=text):
        quick(make_model(), make_batches(), **more)


def test_unavailable_backend_lists_what_exists():
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run.*available: reference"):
        quick(make_model(), make_batches(), backend="cuda")


def bad_batch(change):
    images, labels = make_batches(1)[0]
    return [change(images, labels)]


def with_value(images, value):
    images = images.clone()
    images[1, 2, 3, 4] = value
    return images


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        ([], "loader must yield at least one batch, got none"),
        (5, "loader must be an iterable"),
        (bad_batch(lambda x, y: (x, y + CLASSES)), r"labels in 0\.\.3 .* got [4-7]"),
        (bad_batch(lambda x, y: (x, y - 9)), r"labels in 0\.\.3 .* got -"),
        (bad_batch(lambda x, y: (x, y.float())), r"got torch.float32 \[8\]; pass labels.long"),
        (
            bad_batch(lambda x, y: (x, nn.functional.one_hot(y, CLASSES))),
            r"one-hot or soft labels: pass labels.argmax",
        ),
        (bad_batch(lambda x, y: (x, y[:5])), r"class indices \[8\], one per image, got"),
        (bad_batch(lambda x, y: (x[:, :1], y)), r"model must take the loader's images \[8, 1"),
        (bad_batch(lambda x, y: (x.byte(), y)), "images as a float tensor"),
        (bad_batch(lambda x, y: {"x": x, "y": y}), "must yield \\(images, labels\\), got dict"),
        (
            bad_batch(lambda x, y: (with_value(x, float("nan")), y)),
            r"finite images, got nan .* \[1, 2, 3, 4\]",
        ),
        (bad_batch(lambda x, y: (with_value(x, float("inf")), y)), "finite images, got inf"),
        (bad_batch(lambda x, y: (x.to("meta"), y)), "on cpu or cpu, where the model is, got meta"),
    ],
    ids=lambda value: None if isinstance(value, str) else "loader",
)
def test_bad_batches(loader, text):
    with pytest.raises(ValueError, match=text):
        quick(make_model(), loader)


def test_bad_batch_in_a_later_epoch_keeps_the_inplace_model_usable():
    calls = [0]

    def factory():
        calls[0] += 1
        images, labels = make_batches(1)[0]
        yield (with_value(images, float("nan")) if calls[0] == 4 else images), labels

    model = make_model()
    with pytest.raises(ValueError, match="must yield finite images, got NaN or Inf at epoch 3"):
        quick(model, factory, epochs=4, inplace=True)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_labels_are_checked_before_an_inplace_model_is_touched():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="labels in 0"):
        quick(model, bad_batch(lambda x, y: (x, y + CLASSES)), inplace=True)
    assert equal_states(before, model.state_dict())


def test_bad_models():
    nan, zero, half = make_model(), make_model(), make_model().half()
    with torch.no_grad():
        nan[0].bias[2] = float("nan")
        zero[-1].weight.zero_()
    with pytest.raises(ValueError, match=r"finite weights, got NaN or Inf in 0\.bias"):
        quick(nan, make_batches())
    with pytest.raises(ValueError, match=r"a weight of zeros \(norm 0\)"):
        quick(zero, make_batches())
    with pytest.raises(ValueError, match=r"float32 weights, got .* use model.float"):
        quick(half, make_batches())
    with pytest.raises(ValueError, match=r"got 1|K = 1|at least 2"):
        quick(make_model(classes=1), make_batches())
    two = nn.Module()
    two.a, two.b, two.body = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES), make_model()[:5]
    two.forward = lambda x: two.a(two.body(x)) + two.b(two.body(x))
    with pytest.raises(AmbiguousHeadError, match=r"head="):
        quick(two, make_batches())


def test_progress_on_a_terminal_and_off():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with ProgressReport("fst", 2, True, console) as report:
        report.epoch(quick(make_model(), make_batches()).history[0])
    assert "1/2" in stream.getvalue()


def test_save(tmp_path):
    result = quick(make_model(), make_batches())
    manifest = result.save(tmp_path / "clean.safetensors", parent="abc")
    written = json.loads((tmp_path / "clean.json").read_text())
    assert written == json.loads(json.dumps(manifest))
    assert written["attack_success"] == "not measured"
    assert written["parent"] == "abc"
    assert len(written["history"]) == 2
    loaded = fst_fast.load(tmp_path / "clean.safetensors", make_model())
    assert equal_states(loaded.state_dict(), result.model.state_dict())
