"""``bench end2end``: what comes out is compared, and a speed that changes it is refused."""

import argparse
import json
from dataclasses import replace

import pytest
import torch
from sweep_cases import write_images

from fst_fast.bench import __main__ as bench
from fst_fast.bench import end2end, jobs, machine, options
from fst_fast.data.image_sets import ImageSet
from fst_fast.lab import suspect_manifest, suspect_store
from fst_fast.lab.attacks import attack_of
from fst_fast.triggers import BadNets

CPU = torch.device("cpu")
RATES = {"copy_gb_per_s": 10.0, "fp32_gflop_per_s": 100.0, "bf16_gflop_per_s": 200.0}


def runs(accuracies, successes):
    return [
        end2end.Run(2.0 + i, 1.0, accuracy, success, "fp32")
        for i, (accuracy, success) in enumerate(zip(accuracies, successes, strict=True))
    ]


PLAIN = runs([0.90, 0.92, 0.94], [0.02, 0.03, 0.04])


@pytest.mark.parametrize(
    ("accuracies", "successes", "wrong"),
    [
        ([0.90, 0.92, 0.94], [0.02, 0.03, 0.04], None),
        # Within a point, though the seeds agree.
        ([0.912, 0.912, 0.912], [0.02, 0.03, 0.04], None),
        # Within the spread of the seeds: 3 * sqrt(2 * 0.02**2 / 3) is 4.9 points.
        ([0.94, 0.96, 0.98], [0.02, 0.03, 0.04], None),
        ([0.95, 0.97, 0.99], [0.02, 0.03, 0.04], "clean_accuracy is 97.0%, plain's 92.0%"),
        ([0.90, 0.92, 0.94], [0.08, 0.09, 0.10], "attack_success is 9.0%, plain's 3.0%"),
        ([0.90, 0.92, 0.94], [0.02, 0.03, float("nan")], "attack_success"),
    ],
)
def test_what_is_apart(accuracies, successes, wrong):
    found = end2end.apart(runs(accuracies, successes), PLAIN)
    assert found is None if wrong is None else wrong in found


def test_the_first_run_is_the_cold_one():
    found = end2end.summary(PLAIN)
    assert found["cold_us"] == pytest.approx(3e6)
    assert found["tune_us"] == pytest.approx(3.5e6)
    assert found["attack_success"]["mean"] == pytest.approx(0.03)
    assert found["attack_success"]["std"] == pytest.approx(0.01)


@pytest.fixture
def small(monkeypatch):
    """The digits' job on a few images and an untrained network."""
    monkeypatch.setattr(machine, "rates", lambda device, quick: RATES)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 16, 16, 3), dtype=torch.uint8, generator=generator)
    data = ImageSet(images, torch.arange(24) % 10, tuple("0123456789"))
    spec = jobs.JOBS["digits"].quick()
    order = replace(spec.order, normalize="0.5,0.5,0.5/0.25,0.25,0.25")
    attack = attack_of("badnets", BadNets(), order.rate, 24)

    def make(name, device, **_):
        torch.manual_seed(0)
        fields = suspect_manifest.fields_of(order, data.describe(), attack, None)
        suspect = suspect_manifest.Suspect.of(fields)
        return jobs.Job(spec, order.network.build(10).eval(), suspect, fields, data, data)

    monkeypatch.setattr(jobs, "make", make)


def run(capsys, *arguments):
    command = ["end2end", "--device", "cpu", "--checkpoint", "digits", "--seeds", "2", "--json"]
    status = bench.main([*command, *arguments])
    printed = capsys.readouterr()
    assert printed.out, printed.err
    return status, json.loads(printed.out)


def test_a_record_holds_time_and_result(capsys, small, monkeypatch):
    # Of two seeds on a few images nothing is to be learnt.
    monkeypatch.setattr(end2end, "POINT", 1.0)
    status, record = run(capsys)
    assert status == 0
    (case,) = record["cases"]
    assert case["family"] == "digits"
    assert case["made"]["trigger"]["name"] == "BadNets"
    assert [row["variant"] for row in case["variants"]] == list(end2end.VARIANTS)
    flops = {
        row["variant"]: row["floor_us"] * RATES[f"{row['how']['precision']}_gflop_per_s"]
        for row in case["variants"]
    }
    assert flops["purify (alpha auto)"] > 2 * flops["plain"] > 0
    for row in case["variants"]:
        assert row["p50_us"] == pytest.approx(row["tune_us"] + row["evaluate_us"])
        assert len(row["clean_accuracy"]["values"]) == 2


def test_a_speed_that_changes_the_result_is_refused(capsys, small, monkeypatch):
    def lazy(job, device, seed):
        return end2end.Run(1e-3, 1e-3, 2.0, 0.0, "fp32")

    monkeypatch.setitem(end2end.VARIANTS, "purify", lazy)
    status, record = run(capsys, "--variants", "purify")
    assert status == 1
    (case,) = record["cases"]
    assert [row["variant"] for row in case["variants"]] == ["plain"]
    (refused,) = case["refused"]
    assert "clean_accuracy is 200.0%" in refused["reason"]
    assert "p50_us" not in refused


def test_a_kept_suspect_is_taken_if_it_was_made_so(tmp_path, monkeypatch):
    for name, count in (("train", 60), ("test", 24)):
        write_images(tmp_path / f"{name}.npz", count)
    spec = jobs.JOBS["cifar10-width16"]
    small = replace(spec.order, arch="resnet8:4", epochs=1, rate=0.1, precision="fp32")
    monkeypatch.setitem(jobs.JOBS, "cifar10-width16", replace(spec, order=small, clean_images=8))
    trained = []
    real = suspect_store.train_suspect
    monkeypatch.setattr(
        suspect_store, "train_suspect", lambda *a, **k: trained.append(1) or real(*a, **k)
    )

    def made(**more):
        return jobs.make("cifar10-width16", CPU, data=tmp_path, folder=tmp_path / "kept", **more)

    first, again = made(), made(test_images=5)
    assert torch.equal(first.model.head.weight, again.model.head.weight)
    assert (len(trained), len(first.test), len(again.test)) == (1, 24, 5)
    # Made otherwise, it is made anew, and the other one stays.
    made(quick=True)
    other = replace(small, epochs=2)
    monkeypatch.setitem(jobs.JOBS, "cifar10-width16", replace(spec, order=other, clean_images=8))
    made()
    assert len(trained) == 3
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("name", jobs.JOBS)
def test_only_cifar10_needs_a_folder(name):
    if not jobs.JOBS[name].needs_data:
        pytest.importorskip("sklearn")
        jobs.check(name, None)
    else:
        with pytest.raises(ValueError, match="--data must name a folder"):
            jobs.check(name, None)


def test_the_default_is_all_that_needs_no_data():
    pytest.importorskip("sklearn")
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    for more, names in (([], ["digits", "digits-resnet18"]), (["--quick"], ["digits"])):
        chosen = parser.parse_args(["end2end", "--device", "cpu", *more])
        cases = options.make_settings(chosen, "end2end").cases
        assert [case.checkpoint for case in cases] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "--seeds must be at least 2"),
        (["--test-images", "0"], "--test-images must be at least 1"),
        (["--checkpoint", "cifar10-width16"], "--data must name a folder with train.npz"),
        (["--shapes", "1,2,3"], "--shapes must be left out of the suite end2end"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    assert bench.main(["end2end", "--device", "cpu", *arguments]) == 1
    assert message in capsys.readouterr().err
