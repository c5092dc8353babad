"""The trial on the CPU: what it takes, what it leaves alone, what it puts back."""

import contextlib
import copy

import pytest
import torch
from purify_cases import equal_states, make_batches, make_model, quick
from torch import nn

import fst_fast
from fst_fast.data.batches import native_bf16
from fst_fast.lab.models import resnet18
from fst_fast.tuning import autotune
from fst_fast.tuning.autotune import arrange, choose, threads_of
from fst_fast.tuning.settings import ComputeSettings

CPU = torch.device("cpu")


def arranged(channels_last, precision, threads=None):
    return ComputeSettings(CPU, precision, channels_last, threads)


START = arranged(channels_last=True, precision="bf16", threads=4)
BATCH = make_batches(1, size=8)[0]


def found(seconds, start=START, **allowed):
    return choose(make_model(), *BATCH, start, seconds=seconds, memory={}, **allowed)


def cost(**better):
    """Seconds of a step: 1, times what an arrangement's fields are given as factors."""

    def seconds(a):
        fields = {"contiguous": not a.channels_last, "fp32": a.precision == "fp32"}
        fields |= {"threads2": a.threads == 2, "threads1": a.threads == 1}
        out = 1.0
        for name, factor in better.items():
            out *= factor if fields[name] else 1
        return out

    return seconds


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (cost(), START),
        (cost(contiguous=0.9, fp32=0.9, threads2=0.9), START),
        (cost(contiguous=0.8), arranged(False, "bf16", 4)),
        (cost(fp32=0.8), arranged(True, "fp32", 4)),
        (cost(threads2=0.8), arranged(True, "bf16", 2)),
        (cost(threads1=0.1), START),
        (cost(contiguous=0.8, fp32=0.7, threads2=0.6), arranged(False, "fp32", 2)),
    ],
)
def test_what_is_clearly_faster_is_taken(seconds, expected):
    assert found(seconds) == expected


def test_what_is_pinned_is_not_tried():
    all_better = cost(contiguous=0.1, fp32=0.1, threads2=0.1)
    pinned = {"layouts": False, "precisions": False, "threads": False}
    assert found(all_better, **pinned) == START
    for name, expected in (
        ("layouts", arranged(False, "bf16", 4)),
        ("precisions", arranged(True, "fp32", 4)),
        ("threads", arranged(True, "bf16", 2)),
    ):
        assert found(all_better, **{**pinned, name: True}) == expected


def test_steps_too_short_to_tell_are_left_alone():
    assert found(lambda a: 1e-3 * cost(fp32=0.1)(a)) == START


def test_one_model_decides_for_the_others_of_its_shape():
    memory, calls = {}, []

    def seconds(a):
        calls.append(a)
        return 1.0

    for _ in range(3):
        choose(make_model(), *BATCH, START, seconds=seconds, memory=memory)
    assert len(calls) == 4
    choose(make_model(classes=5), *BATCH, START, seconds=seconds, memory=memory)
    assert len(calls) == 8


class Noisy(nn.Module):
    """Draws random numbers and has statistics."""

    def __init__(self):
        super().__init__()
        self.body = make_model()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.body(self.drop(x))


def test_the_trial_leaves_no_trace():
    model = Noisy().eval()
    model.body[0].weight.requires_grad_(False)
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    threads = torch.get_num_threads()
    timed = autotune._timer(model, *BATCH, True)
    with fst_fast.heads.contexts.restored(model):
        assert timed(START) > 0
        assert not equal_states(model.state_dict(), before), "the steps have been run"
    assert equal_states(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.get_num_threads() == threads
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert not model.body[0].weight.requires_grad


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with contextlib.suppress(KeyError), threads_of(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
    with threads_of(None):
        assert torch.get_num_threads() == before


def test_what_was_asked_for_is_taken():
    asked = ComputeSettings(CPU, "fp32", channels_last=False, threads=3)
    model = make_model().eval()
    assert arrange(model, *BATCH, asked, steps=1000) == arranged(False, "fp32", 3)
    asked = ComputeSettings(CPU, "fp16", channels_last=True)
    assert arrange(model, *BATCH, asked, steps=1) == arranged(True, "fp16", None)


def test_short_runs_go_without_a_trial(monkeypatch):
    def fails(*_, **__):
        raise AssertionError("tried")

    monkeypatch.setattr(autotune, "choose", fails)
    model = make_model().eval()
    usual = arranged(True, "bf16" if native_bf16() else "fp32", None)
    assert arrange(model, *BATCH, ComputeSettings(CPU), steps=39) == usual
    for steps in (40, None):
        with pytest.raises(AssertionError, match="tried"):
            arrange(model, *BATCH, ComputeSettings(CPU), steps=steps)


def test_purify_tells_and_takes_the_arrangement():
    asked = {"precision": "fp32", "channels_last": False, "threads": 1}
    result = quick(make_model(), make_batches(), **asked)
    assert {name: result.settings[name] for name in asked} == asked


def test_a_run_that_goes_on_keeps_its_arrangement(tmp_path, monkeypatch):
    settings = {"precision": "auto", "epochs": 20, "resume": tmp_path}
    fast = arranged(False, "fp32", 1)
    monkeypatch.setattr(autotune, "choose", lambda *_, **__: fast)

    def stop(record, model):
        return record.epoch == 15

    first = quick(make_model(), make_batches(), callbacks=[stop], **settings)
    assert first.settings["precision"] == "fp32"
    other = arranged(True, "bf16", 1)
    monkeypatch.setattr(autotune, "choose", lambda *_, **__: other)
    second = quick(make_model(), make_batches(), **settings)
    assert second.settings["precision"] == "fp32"
    assert not second.settings["channels_last"]
    assert len(second.history) == 20


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
def test_wrong_threads(wrong):
    with pytest.raises(ValueError, match=r"threads must be an integer >= 1 or None, got"):
        quick(make_model(), make_batches(), threads=wrong)


def test_wrong_layout():
    with pytest.raises(ValueError, match="channels_last must be True, False or None, got 'yes'"):
        quick(make_model(), make_batches(), channels_last="yes")


def test_deterministic_runs_try_nothing(monkeypatch):
    def tried(*arguments, **more):
        raise AssertionError("a trial")

    monkeypatch.setattr(autotune, "_fastest", tried)
    free = {"channels_last": None, "threads": None, "precision": "auto", "epochs": 20}
    with pytest.raises(AssertionError, match="a trial"):
        quick(make_model(), make_batches(), **free)
    runs = [quick(make_model(), make_batches(), deterministic=True, **free) for _ in range(2)]
    assert equal_states(*(run.model.state_dict() for run in runs))
    assert runs[0].settings["deterministic"]


@pytest.mark.parametrize(("width", "taken"), [(4, False), (8, True)])
def test_no_layout_in_which_a_backward_pass_may_crash(width, taken):
    """Without the rule the process dies here on CPUs without AVX-512."""
    torch.manual_seed(0)
    batches = [(torch.randn(24, 3, 32, 32), torch.arange(24) % 4) for _ in range(2)]
    result = quick(resnet18(4, width), batches, channels_last=True)
    assert result.settings["channels_last"] is taken
    assert len(result.history) == 2
