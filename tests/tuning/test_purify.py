"""The public verb: what it returns, what it leaves alone, which loaders it takes."""

import copy
import gc
import io
import json
import multiprocessing
import random
import weakref

import numpy as np
import pytest
import torch
from purify_cases import (
    CLASSES,
    equal_states,
    make_batches,
    make_model,
    quick,
)
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fst_fast
from fst_fast.tuning import loop
from fst_fast.tuning.progress import ProgressReport


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


def test_head_shift_by_class():
    model = make_model()
    result = quick(model, make_batches(), alpha=0.3)
    shift = result.head_shift
    for k, (row, row0) in enumerate(zip(result.model[-1].weight, model[-1].weight, strict=True)):
        cosine = (row @ row0 / (row.norm() * row0.norm())).item()
        assert shift.class_cosines[k] == pytest.approx(cosine, abs=1e-5)
        assert shift.class_norms[k] == pytest.approx(row.norm().item(), rel=1e-5)
        assert shift.class_original_norms[k] == pytest.approx(row0.norm().item(), rel=1e-5)
    assert len(shift.class_cosines) == 4


def test_default_call_needs_no_argument(capsys):
    result = fst_fast.purify(make_model(), make_batches(2), check=False)
    assert len(result.history) == 40
    assert result.settings["method"] == "trigger_unlearning"
    assert capsys.readouterr().err.count("epoch") == 40


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


@pytest.mark.parametrize("settings", [{"alpha": 0.1}, {"alpha": "auto"}], ids=str)
def test_a_run_s_memory_is_free_at_its_end(settings, monkeypatch):
    """Without waiting for Python's search for circles: on a GPU that memory is gigabytes."""
    made = []
    real = loop.Tuner.__init__

    def noted(self, *given):
        made.append(weakref.ref(self))
        real(self, *given)

    monkeypatch.setattr(loop.Tuner, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        quick(make_model(), make_batches(), epochs=1, **settings)
        assert [ref() for ref in made] == [None]
    finally:
        gc.enable()


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


def test_one_shot_validation_is_refused():
    validation = iter(make_batches(count=2, size=3, seed=9))
    with pytest.raises(ValueError, match=r"validation must be iterable once per epoch \(3 times\)"):
        quick(make_model(), make_batches(), validation=validation, epochs=1)


def test_validation_is_what_the_history_shows():
    model, batches = make_model(), make_batches()
    validation = make_batches(seed=9)
    result = quick(model, batches, validation=validation)
    expected = fst_fast.evaluate(result.model, validation, device="cpu").clean_accuracy
    assert result.history[-1].clean_accuracy == expected
    plain = quick(model, batches)
    assert equal_states(result.model.state_dict(), plain.model.state_dict())


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
    if backend not in fst_fast.ops.backends.available("head_step_", torch.device("cpu")):
        pytest.skip(f"{backend} is not built here")
    truth = quick(make_model().double(), [(x.double(), y) for x, y in make_batches()])
    result = quick(make_model(), make_batches(), backend=backend)
    for key, want in truth.model.state_dict().items():
        torch.testing.assert_close(
            result.model.state_dict()[key].double(), want.double(), rtol=1e-4, atol=1e-5
        )


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
