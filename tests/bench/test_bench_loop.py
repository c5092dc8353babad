"""``bench loop`` and ``evaluate``: every rung does the same job, and nothing wrong is timed."""

import json

import pytest
import torch
from recorder import Recorder, stand_in
from torch import nn

from fst_fast import DeviceLoader, evaluate, purify
from fst_fast.bench import __main__ as bench
from fst_fast.bench import flops, ladder, loop_cases, machine, overhead, plain
from fst_fast.lab.models import resnet18
from fst_fast.triggers import BadNets

CPU = torch.device("cpu")
RATES = {"copy_gb_per_s": 10.0, "fp32_gflop_per_s": 100.0, "bf16_gflop_per_s": 200.0}


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    monkeypatch.setattr(machine, "rates", lambda device, quick: RATES)
    monkeypatch.setattr(loop_cases, "BATCH", 8)
    # One image of so few is four percent.
    monkeypatch.setitem(ladder.SHARES_APART, "bf16", 0.1)


def run(capsys, suite, *arguments):
    command = [suite, "--shapes", "8,24,1", "--seconds", "0.01", "--device", "cpu", "--json"]
    status = bench.main([*command, *arguments])
    printed = capsys.readouterr()
    assert printed.out, printed.err
    return status, json.loads(printed.out)


def inputs(images=24):
    return loop_cases.LoopCase("loop", 8, images).make_inputs(CPU)


def test_the_plain_loop_is_purify():
    """Written twice, from the paper: the same weights, but for float32's rounding.

    Each step multiplies the rounding, by how much is up to the machine's kernels, so there are few.
    """
    case, given = loop_cases.LoopCase("loop", 8, 24, 1), inputs()
    found = ladder.plainly(syncs=True)(given, case, False, {}).value
    ours = purify(
        given.model_copy(),
        given.device_loader(False),
        alpha=ladder.ALPHA,
        lr=ladder.LR,
        epochs=1,
        precision="fp32",
        channels_last=False,
        progress=False,
        check=False,
    ).model
    there, here, start = (
        nn.utils.parameters_to_vector(m.parameters()).double()
        for m in (found, ours, given.model_copy())
    )
    assert (there - here).norm() < 1e-3 * (there - start).norm()
    assert found.head.weight.norm().item() == pytest.approx(given.model.head.weight.norm().item())


def test_plain_counts_are_those_of_evaluate():
    given = inputs(60)
    found = ladder.plainly_evaluated(given).value
    loader = DeviceLoader(
        given.data.images, given.data.labels, shuffle=False, normalize=loop_cases.NORMALIZE
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
    assert names == [rung.name for rung in ladder.RUNGS[suite](CPU)]
    assert case["refused"] == []
    for row in case["variants"]:
        rate = RATES[f"{row['how']['precision']}_gflop_per_s"]
        assert row["floor_us"] == pytest.approx(case["floor"]["flops"] / rate / 1e3)
        assert row["cold_us"] > 0
    assert case["variants"][0]["speedup_over_plain"] == pytest.approx(1)
    last = case["variants"][-1]
    first = case["variants"][0]
    assert last["speedup_over_plain"] == pytest.approx(first["p50_us"] / last["p50_us"])


def test_on_a_gpu_there_are_graphs_of_one_step_and_of_several(monkeypatch):
    monkeypatch.setattr(ladder, "resolve_precision", lambda *_: "fp32")
    stand_in(monkeypatch, Recorder())
    rungs = {rung.name: rung for rung in ladder.loop_rungs(torch.device("cuda"))}
    case, given = loop_cases.LoopCase("loop", 8, 24, 1), inputs()
    # Of three steps the first is run as it is.
    for name, steps in (("purify", False), ("a graph a step", 1), ("steps in a graph", 2)):
        rung = rungs[name if name in rungs else f"purify ({name})"]
        assert rung.run(given, case, True, {}).how["graphs"] == steps


def test_a_rung_that_ends_elsewhere_is_refused(capsys, monkeypatch):
    def lazy(inputs, case, drawn, how):
        return ladder.Ended(inputs.model_copy(), {"precision": "fp32"})

    monkeypatch.setattr(ladder, "purified", lambda **options: lazy)
    status, record = run(capsys, "loop", "--variants", "purify")
    assert status == 1
    (case,) = record["cases"]
    assert [row["variant"] for row in case["variants"]] == ["plain"]
    assert "ends at a loss of" in case["refused"][0]["reason"]


def test_a_rung_that_fails_is_refused(capsys, monkeypatch):
    def failing(**options):
        def run(*_):
            raise RuntimeError("no room\nmore of it")

        return run

    monkeypatch.setattr(ladder, "purified", failing)
    status, record = run(capsys, "loop", "--variants", "purify")
    assert status == 1
    assert record["cases"][0]["refused"][0]["reason"] == "RuntimeError: no room"


def test_an_evaluation_that_counts_wrong_is_refused(capsys, monkeypatch):
    wrong = ladder.Ended([0.5, 0.5], {"precision": "fp32"})
    monkeypatch.setattr(ladder, "evaluated", lambda precision: lambda *_: wrong)
    status, record = run(capsys, "evaluate")
    assert status == 1
    assert "gives clean accuracy" in record["cases"][0]["refused"][0]["reason"]


def test_people_get_a_table(capsys):
    command = ["evaluate", "--shapes", "8,16,1", "--seconds", "0.01", "--device", "cpu"]
    assert bench.main(command) == 0
    assert "x plain" in capsys.readouterr().out


def test_flops_are_those_of_the_convolutions():
    found = flops.per_image(resnet18(10, 64))
    # 0.5554 G multiply-adds; backward twice as much, but for the gradient of the images.
    assert found.forward == pytest.approx(2 * 0.5554e9, rel=1e-3)
    stem = 2 * 32 * 32 * 3 * 64 * 9
    assert found.training == 3 * found.forward - stem
    case = loop_cases.LoopCase("loop", 64, 1000, 10)
    assert case.flops == found.training * 10_000
    assert loop_cases.LoopCase("evaluate", 64, 1000).flops == 2 * found.forward * 1000
    rates = {"fp32_gflop_per_s": 100.0, "fp32_conv_gflop_per_s": 250.0}
    assert flops.microseconds(250e9, rates, "fp32") == pytest.approx(1e6)


def test_a_slow_step_beside_its_passes_is_overhead(monkeypatch):
    """The loop's part is what comes between a batch and the next; the bare pass is not in it."""
    case, given = loop_cases.LoopCase("loop", 8, 24), inputs()
    clock = iter(range(10_000))
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(clock))

    def loop_of_seven(inputs, case, drawn, how):
        loader = inputs.device_loader(drawn)
        for _ in range(case.epochs):
            for _ in loader:
                for _ in range(7 - 1):
                    next(clock)

    rung = ladder.Rung("ours", None, run=loop_of_seven)
    found = overhead.overhead(rung, given, case, {"precision": "fp32", "channels_last": True})
    assert found.pop("pairs") >= overhead.PAIRS
    assert found == {"step_us": 7e6, "forward_backward_us": 1e6, "share": pytest.approx(6 / 7)}


def test_overhead_and_shares_of_purify_itself(capsys):
    _, record = run(capsys, "loop", "--variants", "purify (auto)")
    (case,) = record["cases"]
    assert case["overhead"]["forward_backward_us"] > 0
    assert case["overhead"]["step_us"] > 0
    assert set(case["shares"]) == {"plain", "purify (auto)"}
    for found in case["shares"].values():
        assert found["step_us"] > 0
        assert sum(found["groups"].values()) == pytest.approx(1, abs=0.05)
        assert found["groups"]["convolutions"] > 0
        assert found["groups"]["loader"] > 0


def test_on_a_gpu_replays_are_compared(monkeypatch):
    """Here with calls in the place of graphs."""

    class Graph:
        def __init__(self, calls):
            (self.replay,) = calls

    class Timer:
        def __init__(self, calls):
            (self.call,) = calls

        def block(self):
            self.call()
            return [0.5e-3], None

    monkeypatch.setattr(overhead, "capture", Graph)
    monkeypatch.setattr(overhead, "EventTimer", Timer)
    monkeypatch.setattr(overhead, "REPLAYS", 1)
    case, how = loop_cases.LoopCase("loop", 8, 20, 1), {"precision": "fp32", "channels_last": True}
    # Two batches of 8, and one of 4.
    found = overhead._replayed(inputs(20), case, how)
    assert found["forward_backward_us"] == pytest.approx(500)
    assert found["step_us"] > 0
    assert found["share"] == pytest.approx(1 - 500 / found["step_us"])
