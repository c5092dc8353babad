"""CUDA graphs on a GPU: the same weights, recorded once for each shape, and no wait on the way."""

import contextlib

import pytest
import torch
from purify_cases import equal_states, make_model, quick

import fst_fast
from fst_fast.lab.models import resnet18
from fst_fast.tuning import cuda_graphs, loop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
METHODS = [
    {"alpha": 0.1},
    {"method": "fst_auto"},
    {"method": "ft"},
    {"method": "fe"},
    {"method": "lp"},
]


def device_loader(count=45, augment="cifar"):
    images = torch.randint(0, 256, (count, 32, 32, 3), generator=torch.Generator().manual_seed(4))
    return fst_fast.DeviceLoader(
        images.to(torch.uint8), torch.arange(count) % 4, 16, device="cuda", augment=augment
    )


def batches_on_the_host():
    return [(images.cpu(), labels.cpu()) for images, labels in device_loader()]


def tuned(loader, model=None, **more):
    model = resnet18(4, 8) if model is None else model
    more = {"device": "cuda", "channels_last": None, "threads": None, "epochs": 3, **more}
    return quick(model, loader, **more)


def with_dropout():
    torch.manual_seed(0)
    model = resnet18(4, 8)
    model.head = torch.nn.Sequential(torch.nn.Dropout(0.3), model.head)
    return model


@pytest.fixture
def recorded(monkeypatch):
    """How many graphs were recorded."""
    made = []
    real = cuda_graphs.CudaGraphs.record
    monkeypatch.setattr(
        cuda_graphs.CudaGraphs, "record", lambda self, f: made.append(1) or real(self, f)
    )
    return made


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("make", [device_loader, batches_on_the_host])
def test_the_same_weights(make, settings, precision, recorded):
    torch.manual_seed(0)
    model = resnet18(4, 8)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        runs = [
            tuned(make(), model, precision=precision, graphs=on, **settings) for on in (True, False)
        ]
    assert len(recorded) == (4 if settings.get("method") == "fst_auto" else 2)
    for name, value in runs[0].model.state_dict().items():
        other = runs[1].model.state_dict()[name]
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(map(str, s.values())))
def test_the_same_weights_however_many_steps_a_graph_holds(settings, precision):
    """Of 189 images by 16: eleven steps in a row, and an odd one."""
    augment = None if settings.get("method") == "lp" else "cifar"
    expected = {False: False, 1: 1, 2: 2, 3: 3, 5: 5, 16: 11}
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        plain, *replayed = [
            tuned(
                *(device_loader(189, augment), with_dropout()),
                **{"graphs": most, "precision": precision, **settings},
            )
            for most in expected
        ]
    assert [run.settings["graphs"] for run in (plain, *replayed)] == list(expected.values())
    for run in replayed:
        for name, value in run.model.state_dict().items():
            other = plain.model.state_dict()[name]
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6, msg=name)


def test_short_steps_are_joined_where_there_are_many(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LAUNCH_SECONDS", 1.0)
    for long, steps in ((1.0, 11), (-1.0, 1)):
        monkeypatch.setattr(cuda_graphs, "LONG_STEP_SECONDS", long)
        result = tuned(device_loader(189, None), make_model(), method="lp")
        assert result.settings["graphs"] == steps


@pytest.mark.parametrize("most", [1, 5, 16])
def test_a_fault_within_a_graph_is_told_to_the_step(most):
    class Spoils(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_model()
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            if self.training:
                self.steps += 1
            return self.net(torch.where(self.steps == 12 + 7, torch.nan, x))

    result = tuned(device_loader(189), Spoils(), alpha=0.1, graphs=most)
    assert "not finite at epoch 2, step 7;" in result.stopped
    assert len(result.history) == 1
    assert result.model.steps == 12 + 6


@pytest.mark.parametrize("most", [1, 16])
def test_no_wait_between_the_first_and_the_last_step(most, monkeypatch):
    real = loop.Tuner._epoch

    def watched(self, *given):
        # The second epoch records.
        mode = "error" if self.position.epoch > 1 else "default"
        torch.cuda.set_sync_debug_mode(mode)
        try:
            return real(self, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop.Tuner, "_epoch", watched)
    result = tuned(device_loader(), alpha=0.1, epochs=6, graphs=most)
    assert [record.epoch for record in result.history] == [1, 2, 3, 4, 5, 6]
    seconds = [record.seconds for record in result.history]
    assert seconds == sorted(seconds)


def test_a_run_without_graphs_does_not_wait_either(monkeypatch):
    @contextlib.contextmanager
    def watched():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    real = loop.Tuner._epoch
    monkeypatch.setattr(loop.Tuner, "_epoch", lambda *a: watched()(real)(*a))
    assert len(tuned(device_loader(), alpha=0.1, graphs=False).history) == 3


@pytest.mark.parametrize("graphs_on", [True, False])
def test_a_bad_label_on_the_device_is_told_and_asserts_nothing(graphs_on):
    loader = [(torch.randn(8, 3, 8, 8).cuda(), torch.tensor([0, 1, 2, 3, 9, 0, 1, 2]).cuda())]
    with pytest.raises(ValueError, match=r"labels in 0..3, got another at epoch 1, step 1"):
        tuned(loader, make_model(), alpha=0.1, graphs=graphs_on)
    assert torch.ones(1, device="cuda").item() == 1


def test_what_cannot_be_recorded_runs_as_it_is(capsys):
    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_model()

        def forward(self, x):
            return self.net(x if x.mean().item() > 10 else x * 0.5)

    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)]
    torch.manual_seed(0)
    # Draws within the recording that fails, and must be able to afterwards.
    model = torch.nn.Sequential(torch.nn.Dropout(0.2), Reads())
    runs = [tuned(batches, model, alpha=0.1, graphs=on, progress=True) for on in ("auto", False)]
    said = " ".join(capsys.readouterr().err.split())
    assert "runs without CUDA graphs" in said
    # What spoiled it, rather than that it was spoiled.
    assert "previous error" not in said
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert equal_states(*(run.model.state_dict() for run in runs))
