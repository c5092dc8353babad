"""The benchmark suite: its arithmetic, and that it times nothing wrong."""

import json

import check as tolerance
import pytest
import torch

from fst_fast.bench import __main__ as bench
from fst_fast.bench import cases, errors, head, machine, peers, suite, timing
from fst_fast.ops import head_step_

CPU = torch.device("cpu")
RATES = {"copy_gb_per_s": 10.0, "fp32_gflop_per_s": 100.0, "bf16_gflop_per_s": 200.0}
SMALL = cases.LossCase(5, 7, 3, "fp32")
QUICK = ["head", "--quick", "--shapes", "5,7,3", "--seconds", "0.01", "--device", "cpu"]


@pytest.fixture
def still(monkeypatch):
    """Neither the machine's rates nor memory are measured."""
    monkeypatch.setattr(machine, "rates", lambda device, quick: RATES)
    unmeasured = {"peak_extra_bytes": None, "kept_bytes": None, "extra_share": None}
    monkeypatch.setattr(head, "_memory", lambda *arguments: unmeasured)


def run(capsys, *arguments):
    """The exit status, and the record as --json prints it."""
    status = bench.main([*QUICK, "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def rows(record, op="head_deviation_loss"):
    (case,) = (case for case in record["cases"] if case["op"] == op)
    return {row["variant"]: row for row in case["variants"]}, case


# Arithmetic


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([5, 1, 4, 2, 3], 0.5, 3), ([5, 1, 4, 2, 3], 0.2, 1.8), ([1, 2], 0.8, 1.8), ([7], 0.2, 7)],
)
def test_percentile(values, share, expected):
    assert timing.percentile(values, share) == pytest.approx(expected)


def test_summary_is_a_ratio_of_medians_and_of_rounds():
    eager = [([4e-6, 4e-6, 40e-6], None), ([8e-6], None), ([4e-6], None)]
    ours = [([1e-6, 2e-6, 3e-6], 5e-7), ([2e-6], 7e-7), ([2e-6], 9e-7)]
    found = timing.summarise(ours)
    assert found["p50_us"] == pytest.approx(2)
    assert found["p20_us"] == pytest.approx(1.8)
    assert found["p80_us"] == pytest.approx(2.2)
    assert found["host_p50_us"] == pytest.approx(0.7)
    assert (found["samples"], found["rounds"]) == (5, 3)
    ratio, between = timing.speedup(ours, eager)
    assert ratio == pytest.approx(4 / 2)
    # By rounds: 2, 4, 2.
    assert between == pytest.approx([2, 3.2])


def test_floor_is_the_larger_of_products_and_bytes():
    found = cases.floor(cases.LossCase(1024, 512, 1000, "bf16"), RATES)
    assert found["flops"] == 6 * 1024 * 512 * 1000
    assert found["bytes"] == 2 * 2 * 1024 * 512 + (4 + 4 + 4) * 1000 * 512
    assert found["us"] == pytest.approx(found["flops"] / 200e9 * 1e6)
    small = cases.floor(cases.StepCase(10, 512), RATES)
    assert small["us"] == pytest.approx(20 * 10 * 513 / 10e9 * 1e6)


def test_rounds_take_turns_and_are_at_least_three():
    log = []

    class Slow:
        seconds = 100.0

        def __init__(self, name):
            self.name = name

        def block(self):
            log.append(self.name)
            return [1.0], None

    out = timing.interleave({name: Slow(name) for name in "abc"}, seconds=1)
    assert "".join(log) == "abcbcacab"
    assert [len(blocks) for blocks in out.values()] == [3, 3, 3]


def test_a_timer_rotates_its_inputs():
    log = []
    timer = timing.HostTimer([lambda i=i: log.append(i) for i in range(3)], expected=0.004)
    samples, _ = timer.block()
    # One untimed call leads.
    assert log == [0, 1]
    assert len(samples) == 1
    timer.block()
    assert log == [0, 1, 2, 0]


def test_inputs_outgrow_the_cache(monkeypatch):
    case = cases.LossCase(64, 64, 10, "fp32")
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 10 * case.bytes)
    sets = head.make_sets(case, CPU)
    assert len(sets) == 30
    assert not torch.equal(sets[0].features, sets[1].features)
    monkeypatch.setattr(machine, "cache_bytes", lambda device: case.bytes // 10)
    assert len(head.make_sets(case, CPU)) == 2


# What is right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.9, 1.1])
def test_verdict_is_that_of_the_tests(dtype, share):
    truth = torch.tensor([8.0, 1.0], dtype=torch.float64)
    eager = truth + torch.tensor([0, 0.25], dtype=torch.float64)
    bound = 2 * 0.25 + 8 * torch.finfo(dtype).eps
    got = (truth + torch.tensor([0, share * bound], dtype=torch.float64)).to(dtype)
    measures = errors.of({"x": eager}, {"x": (None, truth)})
    found = errors.of({"x": got}, {"x": (None, truth)})
    assert (errors.verdict({"x": got}, found, measures) is None) == (share < 1)
    try:
        tolerance.assert_no_worse_than_torch(got, eager, truth, name="x")
    except AssertionError:
        assert share > 1
    else:
        assert share < 1


@pytest.mark.parametrize(
    "got", [None, torch.ones(2), torch.tensor([1.0, 2.0, float("nan")])], ids=str
)
def test_missing_misshapen_and_nan_results_are_wrong(got):
    truth = {"x": (None, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))}
    assert "x is off" in errors.verdict({"x": got}, errors.of({"x": got}, truth), {"x": 0.1})


@pytest.mark.parametrize("huge", [False, True])
def test_truth_of_the_loss_is_autograd_in_float64(monkeypatch, huge):
    monkeypatch.setattr(cases.LossCase, "huge", huge)
    monkeypatch.setattr(cases, "CHECKED_ROWS", 4)
    # Two rows of logits at a time.
    monkeypatch.setattr(cases, "DOUBLES_AT_A_TIME", 2 * 30)
    case = cases.LossCase(7, 6, 30, "bf16")
    inputs = case.make_inputs(0, CPU)
    truth = case.truth(inputs)
    x, w, b = (
        t.detach().double().requires_grad_() for t in (inputs.features, inputs.weight, inputs.bias)
    )
    loss = torch.nn.functional.cross_entropy(x @ w.T + b, inputs.labels)
    (loss + cases.ALPHA * (w * inputs.weight0).sum()).backward()
    for name, full in {"d_features": x.grad, "d_weight": w.grad, "d_bias": b.grad}.items():
        chosen, value = truth[name]
        assert (chosen is not None) == (huge and name != "d_bias")
        expected = full if chosen is None else full[chosen]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    if huge:
        assert len(truth["d_features"][0]) == 4
        assert set(inputs.labels[:2].tolist()) <= set(truth["d_weight"][0].tolist())


def test_truth_of_the_step_is_the_reference_in_float64():
    case = cases.StepCase(4, 6)
    inputs = case.make_inputs(0, CPU)
    truth = case.truth(inputs)
    doubles = [t.double() for t in list(vars(inputs).values())[:6]]
    head_step_(
        *doubles, lr=cases.LR, momentum=cases.MOMENTUM, norm=inputs.norm, backend="reference"
    )
    names = ("weight", "bias", None, None, "weight_momentum", "bias_momentum")
    for name, expected in zip(names, doubles, strict=True):
        if name:
            torch.testing.assert_close(truth[name][1], expected, rtol=1e-12, atol=1e-12)


def broken_loss(scale):
    def make(inputs):
        def call():
            loss = peers._our_loss_unbroken("reference")(inputs)()
            inputs.weight.grad *= scale
            return loss

        return call

    return lambda backend: make


def test_a_wrong_variant_of_ours_is_never_timed(still, monkeypatch, capsys):
    monkeypatch.setattr(peers, "_our_loss_unbroken", peers._our_loss, raising=False)
    monkeypatch.setattr(peers, "_our_loss", broken_loss(1.001))
    status, record = run(capsys, "--dtype", "fp32", "--variants", "reference")
    assert status == 1
    timed, case = rows(record)
    assert list(timed) == ["eager"]
    (refused,) = case["refused"]
    assert refused["variant"] == "reference"
    assert refused["ours"]
    assert "d_weight is off by 1.0e-03" in refused["reason"]
    # The other op is not to blame.
    assert "reference" in rows(record, "head_step_")[0]


def test_the_same_variant_unbroken_is_timed(still, monkeypatch, capsys):
    monkeypatch.setattr(peers, "_our_loss_unbroken", peers._our_loss, raising=False)
    monkeypatch.setattr(peers, "_our_loss", broken_loss(1.0))
    status, record = run(capsys, "--dtype", "fp32", "--variants", "reference")
    assert status == 0
    assert list(rows(record)[0]) == ["eager", "reference"]


def test_others_are_shown_with_their_error_or_refused(still, monkeypatch, capsys):
    def off(*tensors):
        return peers._eager(*tensors) * 1.01

    def failing(*tensors):
        raise AssertionError("no such dtype")

    patched = {"eager": peers._eager, "linear_cross_entropy": off, "liger": failing}
    monkeypatch.setattr(peers, "_CROSS_ENTROPIES", patched)
    monkeypatch.setattr(peers, "_PACKAGES", {})
    # A torch that has none refuses before it is called.
    monkeypatch.setattr(peers.F, "linear_cross_entropy", off, raising=False)
    chosen = "linear_cross_entropy,liger"
    status, record = run(capsys, "--dtype", "fp32", "--variants", chosen)
    assert status == 0
    timed, case = rows(record)
    assert "loss is off by" in timed["linear_cross_entropy"]["reason"]
    assert timed["linear_cross_entropy"]["errors"]["loss"] > 1e-3
    assert timed["linear_cross_entropy"]["p50_us"] > 0
    assert [row["reason"] for row in case["refused"]] == ["AssertionError: no such dtype"]


def test_without_eager_nothing_is_timed(still, monkeypatch, capsys):
    monkeypatch.setattr(peers, "_CROSS_ENTROPIES", {"eager": lambda *t: 0 * t[0].sum() / 0})
    status, record = run(capsys, "--dtype", "fp32", "--variants", "reference")
    assert status == 1
    timed, case = rows(record)
    assert timed == {}
    assert [row["variant"] for row in case["refused"]] == ["eager", "reference"]


def test_the_interpreter_is_never_timed():
    # conftest.py has switched it on, where there is no GPU.
    (triton,) = (v for v in peers.variants(SMALL, CPU) if v.name == "triton")
    assert "interpreter" in triton.obstacle


def test_huge_cases_and_slow_variants_are_left_out():
    quick = cases.select(None, ["fp32"], quick=True)
    everything = cases.select(None, ["fp32"], quick=False)
    assert not any(case.huge for case in quick)
    assert {case.shape for case in everything} - {case.shape for case in quick} == {
        (4096, 768, 21841),
        (4096, 512, 100000),
        (21841, 768),
        (100000, 512),
    }
    huge = cases.LossCase(4096, 512, 100000, "fp32")
    slow = {v.name: v.obstacle for v in peers.variants(huge, CPU) if v.name in peers.SLOW}
    said = ("left out of huge cases", "has no F.linear_cross_entropy")
    assert all(any(words in reason for words in said) for reason in slow.values())
    (named,) = (v for v in peers.variants(huge, CPU, ["reference"]) if v.name == "reference")
    assert named.obstacle is None


def test_others_that_are_very_slow_are_called_once():
    def facts(seconds):
        return suite.Facts(None, seconds)

    names = {"eager": (False, 1.0), "patient": (False, 1.9), "slow": (False, 2.1), "cpu": (True, 9)}
    right = {peers.Variant(n, None, ours): facts(s) for n, (ours, s) in names.items()}
    kept, slow = head.without_the_slow(right)
    assert [variant.name for variant in kept] == ["eager", "patient", "cpu"]
    ((variant, found),) = slow.items()
    assert variant.name == "slow"
    assert found.reason == "one call took 2.1 s, eager's 1.0 s; not timed again"
