"""``bench inject``: every variant makes the reference's batches, and nothing wrong is timed."""

import json
from dataclasses import replace

import pytest
import torch

from fst_fast.bench import __main__ as bench
from fst_fast.bench import columns, inject, inject_cases, inject_peers, machine
from fst_fast.ops import inject as op
from fst_fast.ops.reference import inject as truth

CPU = torch.device("cpu")
RATES = {"copy_gb_per_s": 10.0, "fp32_gflop_per_s": 100.0, "bf16_gflop_per_s": 200.0}
QUICK = ["inject", "--shapes", "3,8,9", "--seconds", "0.01", "--device", "cpu", "--json"]
QUICK += ["--variants", "reference,cpu"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(machine, "rates", lambda device, quick: RATES)
    monkeypatch.setattr(inject_cases, "DATASET_BYTES", 20_000)
    inject_cases._store.cache_clear()
    yield
    inject_cases._store.cache_clear()


def run(capsys, *arguments):
    status = bench.main([*QUICK, *arguments])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("dtype", inject_cases.DTYPES)
@pytest.mark.parametrize("family", inject_cases.FAMILIES)
def test_every_variant_makes_the_reference_s_batch(family, dtype):
    case = inject_cases.InjectCase(family, 5, 16, 16, dtype)
    found = inject_peers.variants(case, CPU)
    ready = [v for v in found if v.obstacle is None and v.name != "compile"]
    right, refused = inject.checked(case, ready, CPU)
    assert not refused
    assert {"pil", "torch", "torchvision_v2", "reference"} <= {v.name for v in right}
    for variant, facts in right.items():
        if variant.inexact is None:
            assert facts.told["differing"] == 0, variant.name


@pytest.mark.parametrize("family", inject_cases.FAMILIES)
def test_a_batch_carries_its_trigger_everywhere(family):
    case = inject_cases.InjectCase(family, 6, 8, 9, "fp32")
    inputs = case.make_inputs(3, CPU).still()
    stored, source = inputs.stored, inputs.params[:, truth.SOURCE].long()
    images, labels = op(stored.images, inputs.params, inputs.lut, stored.tables)
    expected = stored.images[source]
    if stored.trigger is not None:
        expected = stored.trigger.apply(expected, keys=source)
        assert not torch.equal(expected, stored.images[source])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (inject_cases.MEAN, inject_cases.STD))
    assert torch.equal(images, (expected.permute(0, 3, 1, 2) / 255 - mean) / std)
    assert torch.equal(labels, inputs.params[:, truth.LABEL].long())
    moved = case.make_inputs(3, CPU).params[:, truth.ROW : truth.FLIP + 1]
    assert moved.min() < 0 < moved.max()


def test_bytes_are_what_must_move():
    case = inject_cases.InjectCase("plain", 128, 32, 32, "bf16")
    assert case.bytes == 128 * 32 * 32 * 3 * (1 + 2)


def test_the_record_has_ratios_and_rates(capsys):
    status, record = run(capsys, "--dtype", "fp32", "--families", "plain,gather")
    assert status == 0
    assert record["suite"] == "inject"
    assert [case["family"] for case in record["cases"]] == ["plain", "gather"]
    for case in record["cases"]:
        rows = {row["variant"]: row for row in case["variants"]}
        assert {"pil", "torch", "reference"} <= set(rows)
        assert rows["pil"]["speedup_over_pil"] == pytest.approx(1)
        ratio = rows["pil"]["p50_us"] / rows["torch"]["p50_us"]
        assert rows["torch"]["speedup_over_pil"] == pytest.approx(ratio)
        moved = 3 * 8 * 9 * 3 * 5
        assert case["floor"]["us"] == pytest.approx(moved / 10e9 * 1e6)
        assert rows["torch"]["gb_per_s"] == pytest.approx(moved / rows["torch"]["p50_us"] / 1e3)


def test_people_get_a_table(capsys):
    assert bench.main([*(a for a in QUICK if a != "--json"), "--families", "badnets"]) == 0
    out = capsys.readouterr().out
    assert "inject badnets" in out
    assert "every bit" in out
    assert columns.name({"op": "head_step_"}) == "head_step_"


# What is wrong


def broken(change):
    """Our reference's batch, changed."""

    def ours(backend):
        def make(inputs):
            i = inputs

            def call():
                images, labels = op(
                    i.stored.images, i.params, i.lut, i.stored.tables, backend="reference"
                )
                return change(images.clone(), labels.clone())

            return call

        return make

    return ours


def one_value(images, labels):
    images[0, 0, 3, 3] += 1e-6
    return images, labels


def one_label(images, labels):
    labels[1] += 1
    return images, labels


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (one_value, "0.15% of the values differ"),
        (one_label, "other labels"),
        (lambda images, labels: (images.double(), labels), "gives torch.float64"),
        (lambda images, labels: (images * float("nan"), labels), "100.00% of the values differ"),
        (lambda images, labels: (_ for _ in ()).throw(KeyError("lost")), "KeyError: 'lost'"),
    ],
)
def test_a_wrong_variant_of_ours_is_never_timed(monkeypatch, capsys, change, reason):
    monkeypatch.setattr(inject_peers, "_ours", broken(change))
    arguments = ("--dtype", "fp32", "--families", "badnets", "--variants", "reference")
    status, record = run(capsys, *arguments)
    assert status == 1
    (case,) = record["cases"]
    assert [row["variant"] for row in case["variants"]] == ["pil", "torch"]
    (refused,) = case["refused"]
    assert reason in refused["reason"]


def test_another_may_differ_by_a_level_here_and_there_and_no_more():
    case = inject_cases.InjectCase("plain", 8, 16, 16, "fp32")
    inputs = case.make_inputs(0, CPU)
    expected = op(inputs.stored.images, inputs.params, inputs.lut, backend="reference")
    level = 1 / 255 / torch.tensor(inject_cases.STD).view(3, 1, 1)

    def verdict(share, levels, inexact=True):
        images = expected[0].clone()
        chosen = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) < share
        images += chosen * level * levels
        return inject.judge((images, expected[1]), expected, inexact).reason

    assert verdict(0.005, 1) is None
    assert verdict(1.0, 1e-4) is None
    assert "differ" in verdict(0.005, 1, inexact=False)
    assert "by up to 1.5 byte levels" in verdict(0.005, 1.5)
    assert "differ" in verdict(0.02, 1)
    nothing = replace(inputs, params=inputs.params[:0])
    empty = op(nothing.stored.images, nothing.params, nothing.lut, backend="reference")
    assert inject.judge(empty, empty, inexact=False).reason is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inject", "--variants", "eager"], "--variants must be among pil, torch"),
        (["head", "--families", "plain"], "--families must be left out of the suite head"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    assert bench.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_baseline_can_be_left_out(capsys):
    status, record = run(capsys, "--families", "plain", "--without", "pil")
    assert status == 0
    for case in record["cases"]:
        assert [row["variant"] for row in case["variants"]] == ["torch", "reference", "cpu"]
        assert all("speedup_over_pil" not in row for row in case["variants"])
    assert bench.main([*QUICK, "--without", "pill"]) == 1
    assert "--without must be among pil, " in capsys.readouterr().err
    assert bench.main(["loop", "--device", "cpu", "--without", "plain"]) == 1
    assert "it belongs to inject" in capsys.readouterr().err


def test_a_run_that_is_cut_off_leaves_the_cases_before(monkeypatch, tmp_path, capsys):
    real, seen = inject.measure_case, []

    def measure(case, settings):
        if seen:
            raise KeyboardInterrupt
        seen.append(case)
        return real(case, settings)

    monkeypatch.setattr(inject, "measure_case", measure)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*QUICK, "--record", str(tmp_path)])
    (left,) = tmp_path.rglob("*.*")
    assert left.name == "inject.unfinished"
    assert [case["family"] for case in json.loads(left.read_text())["cases"]] == ["plain"]
    # A whole record takes its place.
    monkeypatch.setattr(inject, "measure_case", real)
    assert bench.main([*QUICK, "--families", "plain", "--record", str(tmp_path)]) == 0
    assert [path.suffix for path in tmp_path.rglob("*.*")] == [".json"]
