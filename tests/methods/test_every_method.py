"""Every method's replayed and resumed runs end in the same bits, and its models stay plain."""

import doctest
import inspect
import json

import pytest
import torch
from purify_cases import CLASSES, assert_same_run, equal_states, make_batches, make_model, quick
from recorder import Recorder, stand_in
from torch import nn

import fst_fast
from fst_fast import methods

# The searches of these methods are kept short.
SHORT = {
    "bna": {"search_steps": 5},
    "bti_dbf": {"mask_steps": 4, "invert_steps": 6},
    "ssft": {"probe_steps": 3},
    "tsbd": {"passes": 3},
}
every_method = pytest.mark.parametrize("name", methods.available())


def short(name):
    return methods.get(name, **SHORT.get(name, {}))


class Block(nn.Module):
    """A residual block with a projection."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        self.projection = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.last(self.layers(x)) + self.projection(x)


def model_for(name):
    """The small model, with a residual block where the method needs one."""
    model = make_model()
    return model.insert(3, Block()) if name == "ssft" else model


def device_loader():
    images = torch.randint(0, 256, (21, 8, 8, 3), generator=torch.Generator().manual_seed(4))
    return fst_fast.DeviceLoader(
        images.to(torch.uint8), torch.arange(21) % CLASSES, 8, seed=3, augment="cifar"
    )


@every_method
@pytest.mark.parametrize("loader", [make_batches, device_loader])
def test_replayed_steps_end_in_the_same_bits(name, loader, monkeypatch):
    recorder = stand_in(monkeypatch, Recorder())
    notes = []
    monkeypatch.setattr("fst_fast.tuning.progress.Bar.note", lambda self, text: notes.append(text))
    runs = [
        quick(model_for(name), loader(), method=short(name), epochs=3, graphs=on)
        for on in ("auto", False)
    ]
    assert_same_run(*runs)
    assert not [note for note in notes if "graphs" in note or "replays" in note]
    assert recorder.replays > 0


@every_method
def test_a_resumed_run_ends_in_the_same_bits(name, tmp_path):
    settings = {"method": short(name), "epochs": 3}
    whole = quick(model_for(name), device_loader(), **settings)

    def stop(record, model):
        return record.epoch == 2

    quick(model_for(name), device_loader(), resume=tmp_path, callbacks=[stop], **settings)
    again = quick(model_for(name), device_loader(), resume=tmp_path, **settings)
    assert_same_run(again, whole)


@every_method
def test_the_loss_scale_of_fp16_goes_through(name):
    result = quick(model_for(name), make_batches(), method=short(name), epochs=3, precision="fp16")
    assert result.stopped is None
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


@every_method
def test_a_plain_model_is_left_and_the_suspect_as_it_was(name):
    suspect = model_for(name)
    before = {key: value.clone() for key, value in suspect.state_dict().items()}
    result = quick(suspect, make_batches(), method=short(name))
    assert equal_states(suspect.state_dict(), before)
    assert [type(m) for m in result.model.modules()] == [type(m) for m in suspect.modules()]
    after = result.model.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in after.items()] == [
        (k, v.shape, v.dtype) for k, v in before.items()
    ]
    for module in result.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.requires_grad and p.grad is None for p in result.model.parameters())
    assert isinstance(result.model, nn.Sequential)


@every_method
def test_settings_are_plain_values_that_make_the_same_method(name):
    settings = json.loads(json.dumps(methods.get(name).settings()))
    assert settings.pop("method") == name
    assert methods.get(name, **settings) == methods.get(name)


@every_method
def test_the_example_of_its_docstring_runs(name):
    text = inspect.cleandoc(methods.METHODS[name].__doc__)
    test = doctest.DocTestParser().get_doctest(text, {"fst_fast": fst_fast}, name, None, 0)
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not report
