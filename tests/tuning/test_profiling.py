"""``purify --profile``: which steps are in the trace, and where their time is put."""

import json
from types import SimpleNamespace

import pytest
import torch

from fst_fast import DeviceLoader, purify
from fst_fast.lab.models import resnet8
from fst_fast.tuning import profiling
from fst_fast.tuning.profiling import StepProfile, of_run

CPU = torch.autograd.DeviceType.CPU


def make_loader(images=48):
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (images, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return DeviceLoader(stored, torch.arange(images) % 10, 8)


def test_a_trace_of_a_few_steps(tmp_path, capsys):
    path = tmp_path / "trace.json"
    profile = StepProfile(make_loader(), 2, 3)
    purify(resnet8(10, 8), profile, alpha=0.1, epochs=1, progress=False, check=False)
    profile.save(path)
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    # Three steps of nine convolutions.
    assert names.count("aten::convolution_backward") == 27
    assert "fst_fast: next batch" in names
    shares = profile.shares()
    assert profile.steps == 3
    assert sum(shares.values()) == pytest.approx(1, abs=0.05)
    assert shares["convolutions"] > 0
    assert "convolutions" in capsys.readouterr().err


def test_the_batches_are_the_loaders():
    profiled, plain = list(StepProfile(make_loader(), 100)), list(make_loader())
    for (images, labels), (others, wanted) in zip(profiled, plain, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, wanted)
    profile = StepProfile(make_loader(), 1)
    profile.set_epoch(3)
    assert profile.loader._epoch == 3


def test_time_goes_to_the_nearest_group():
    def event(name, us, parent=None):
        return SimpleNamespace(
            name=name, self_cpu_time_total=us, cpu_parent=parent, device_type=CPU
        )

    step = event("Optimizer.step#SGD.step", 1e5)
    backward = event("autograd::engine::evaluate_function: ConvolutionBackward0", 0.0)
    events = [
        *(step, event("aten::copy_", 1e5, step), backward),
        *(event("aten::copy_", 3e5, backward), event("aten::copy_", 1e5)),
    ]
    found = profiling.shares(events, seconds=1.0)
    assert found["optimizer"] == pytest.approx(0.2)
    assert found["convolutions"] == pytest.approx(0.3)
    assert found["other ops"] == pytest.approx(0.1)
    assert found["between ops"] == pytest.approx(0.4)


def test_the_steps_are_in_the_middle_of_the_run(tmp_path):
    profile = of_run(make_loader(), 10, tmp_path / "trace.json")
    assert (profile.first, profile.last) == (5 * 6 + 1, 6 * 6)


def test_what_cannot_be_profiled_is_said(tmp_path):
    with pytest.raises(ValueError, match="a folder that exists"):
        of_run(make_loader(), 10, tmp_path / "none" / "trace.json")
    with pytest.raises(ValueError, match="must tell its length"):
        of_run(iter([]), 10, tmp_path / "trace.json")
    profile = StepProfile(make_loader(), 50)
    list(profile)
    with pytest.raises(RuntimeError, match="more than 51 steps, got 6"):
        profile.save(tmp_path / "trace.json")
