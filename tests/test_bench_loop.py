"""``bench loop`` and ``evaluate``: every rung does the same job, and nothing wrong is timed."""

import json

import pytest
import torch
from torch import nn

from fst_fast import DeviceLoader, evaluate, purify
from fst_fast.bench import __main__ as bench
from fst_fast.bench import loop, machine, plain
from fst_fast.triggers import BadNets

CPU = torch.device("cpu")
RATES = {"copy_gb_per_s": 10.0, "fp32_gflop_per_s": 100.0, "bf16_gflop_per_s": 200.0}


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda device, quick: RATES)
    monkeypatch.setattr(loop, "BATCH", 16)


def run(capsys, suite, *arguments):
    command = [suite, "--shapes", "2,40,1", "--seconds", "0.01", "--device", "cpu", "--json"]
    status = bench.main([*command, *arguments])
    return status, json.loads(capsys.readouterr().out)


def inputs(images=40):
    return loop.LoopCase("loop", 2, images).make_inputs(CPU)


def test_the_plain_loop_is_purify():
    """Written twice, from the paper: the same weights within float32's rounding."""
    # Few steps: they multiply the rounding.
    case, given = loop.LoopCase("loop", 2, 40, 1), inputs()
    found = loop._plainly(syncs=True)(given, case, False)
    ours = purify(
        given.model_copy(),
        given.device_loader(False),
        alpha=loop.ALPHA,
        lr=loop.LR,
        epochs=1,
        precision="fp32",
        progress=False,
    ).model
    for one, other in zip(found.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert found.head.weight.norm().item() == pytest.approx(given.model.head.weight.norm().item())


def test_plain_counts_are_those_of_evaluate():
    given = inputs(60)
    found = loop._plain_evaluate(given, None, False)
    loader = DeviceLoader(
        given.data.images, given.data.labels, shuffle=False, normalize=loop.NORMALIZE
    )
    metrics = evaluate(given.model, loader, BadNets(), target=0)
    assert found == [metrics.clean_accuracy, metrics.attack_success]


class Echo(nn.Module):
    """Classifies an image as its red corner says."""

    def forward(self, x):
        return nn.functional.one_hot(x[:, 0, 0, 0].long(), 4).float()


def test_plain_counts_leave_the_target_class_out():
    images = torch.zeros(5, 3, 2, 2)
    images[:, 0, 0, 0] = torch.tensor([1, 1, 2, 3, 1])
    loader = [(images, torch.tensor([1, 0, 2, 2, 3]))]
    assert plain.counts(Echo(), loader, CPU) == (2, 5)
    assert plain.counts(Echo(), loader, CPU, target=1) == (2, 4)


@pytest.mark.parametrize("suite", ["loop", "evaluate"])
def test_every_rung_is_right_and_timed(capsys, suite):
    status, record = run(capsys, suite)
    assert status == 0
    (case,) = record["cases"]
    names = [row["variant"] for row in case["variants"]]
    assert names == [rung.name for rung in loop.RUNGS[suite](CPU)]
    assert case["refused"] == []
    assert case["variants"][0]["speedup_over_plain"] == pytest.approx(1)
    last = case["variants"][-1]
    first = case["variants"][0]
    assert last["speedup_over_plain"] == pytest.approx(first["p50_us"] / last["p50_us"])


def test_a_rung_that_ends_elsewhere_is_refused(capsys, monkeypatch):
    def lazy(inputs, case, drawn):
        return inputs.model_copy()

    monkeypatch.setattr(loop, "_purify", lambda precision: lazy)
    status, record = run(capsys, "loop", "--variants", "purify")
    assert status == 1
    (case,) = record["cases"]
    assert [row["variant"] for row in case["variants"]] == ["plain"]
    assert "ends at a loss of" in case["refused"][0]["reason"]


def test_an_evaluation_that_counts_wrong_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(loop, "_our_evaluate", lambda *_: [0.5, 0.5])
    status, record = run(capsys, "evaluate")
    assert status == 1
    assert "gives clean accuracy" in record["cases"][0]["refused"][0]["reason"]


def test_people_get_a_table(capsys):
    command = ["evaluate", "--shapes", "2,16,1", "--seconds", "0.01", "--device", "cpu"]
    assert bench.main(command) == 0
    assert "x plain" in capsys.readouterr().out
