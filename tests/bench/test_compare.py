"""benchmarks/compare.py: what got slower, by the ratio that carries over."""

import json

import compare
import pytest


def row(variant, us, base=400.0, ours=True):
    return {"variant": variant, "ours": ours, "p50_us": us, "speedup_over_plain": base / us}


def record(*rows, suite="loop", device="some CPU", shape=(16, 1000, 10)):
    case = {"op": suite, "shape": list(shape), "dtype": "fp32", "threads": 1}
    return {
        "suite": suite,
        "device": {"type": "cpu", "name": device},
        "cases": [{**case, "variants": list(rows)}],
    }


PLAIN = row("plain", 400.0, ours=False)
BEFORE = record(PLAIN, row("purify", 200.0))


@pytest.fixture
def run(tmp_path, capsys):
    def call(before, after, *arguments):
        paths = []
        for name, content in (("a.json", before), ("b.json", after)):
            path = tmp_path / name
            path.write_text(content if isinstance(content, str) else json.dumps(content))
            paths.append(str(path))
        status = compare.main([*paths, *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_the_same_is_not_slower(run):
    status, out, err = run(BEFORE, BEFORE)
    assert (status, err) == (0, "")
    assert "loop 16,1000,10 fp32 1 thread" in out


def test_the_ratio_to_the_baseline_decides(run):
    # A machine half as fast: times double, the ratio stays.
    slow = record(row("plain", 800.0, 800.0, ours=False), row("purify", 400.0, 800.0))
    assert run(BEFORE, slow)[0] == 0
    # As fast a time on a machine twice as fast is a loss.
    lost = record(row("plain", 200.0, 200.0, ours=False), row("purify", 200.0, 200.0))
    status, out, err = run(BEFORE, lost)
    assert status == 1
    assert "purify: 2.00 times as slow as before, 1.10 is allowed" in err
    assert "plain 2.00" in out
    assert run(BEFORE, lost, "--threshold", "2.1")[0] == 0


def test_without_a_baseline_the_medians_decide(run):
    before, after = ({**BEFORE, "cases": [dict(BEFORE["cases"][0])]} for _ in range(2))
    for found, us in ((before, 100.0), (after, 112.0)):
        found["cases"][0]["variants"] = [{"variant": "purify", "ours": True, "p50_us": us}]
    assert run(before, after)[0] == 1
    assert run(before, after, "--threshold", "1.13")[0] == 0


def test_a_slower_rival_is_no_loss(run):
    rivals = [
        record(PLAIN, row("purify", 200.0), row("rival", us, ours=False)) for us in (100, 300)
    ]
    assert run(*rivals)[0] == 0


def test_a_variant_that_is_gone_is_a_loss(run):
    status, _, err = run(BEFORE, record(PLAIN))
    assert status == 1
    assert "purify: in the first record only" in err
    assert run(record(PLAIN), BEFORE)[0] == 0


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (record(PLAIN, suite="evaluate"), "of one suite, got loop and evaluate"),
        (record(PLAIN, device="another"), "of one device, got ['cpu', 'some CPU']"),
        (record(PLAIN, shape=(64, 1000, 10)), "a case and a variant in common"),
        ({"rows": []}, "must be a record of fst_fast.bench"),
        ("not JSON", "must be a record in JSON"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, after, message):
    status, out, err = run(BEFORE, after)
    assert (status, out) == (2, "")
    assert message in err


def test_devices_are_compared_by_force(run):
    assert run(BEFORE, record(PLAIN, row("purify", 200.0), device="another"), "--force")[0] == 0


def test_a_missing_file_is_said(capsys, tmp_path):
    assert compare.main([str(tmp_path / "none.json")] * 2) == 2
    assert "No such file" in capsys.readouterr().err
