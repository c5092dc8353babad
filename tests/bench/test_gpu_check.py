"""``make gpu-check`` with a Python that only writes down what it is asked: resuming and limits."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
FAKE = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
case "$*" in
  *"$FAIL"*) [ -z "$FAIL" ] || exit 3 ;;
esac
case "$*" in
  *"$HANG"*) [ -z "$HANG" ] || exec sleep 60 ;;
esac
"""
SUITES = ("head", "inject", "loop", "evaluate", "end2end")


@pytest.fixture
def call(tmp_path):
    """Runs the script; returns the exit status, the summary's lines and what was called."""
    tools, log, out = tmp_path / "bin", tmp_path / "log", tmp_path / "out"
    tools.mkdir()
    for name in ("python", "compute-sanitizer"):
        (tools / name).write_text(FAKE)
        (tools / name).chmod(0o755)

    def run(**settings):
        log.write_text("")
        environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(tools / "python"),
            "LOG": str(log),
            "FAIL": "",
            "HANG": "",
            "DATA": "",
            **settings,
        }
        command = ["bash", str(SCRIPT), str(out)]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment
        )
        called = [line for line in log.read_text().splitlines() if "-c import" not in line]
        return result.returncode, (out / "summary.txt").read_text().splitlines(), called

    return run


def test_every_part_runs_once(call):
    status, summary, called = call()
    assert status == 0
    assert all("exit status 0, " in line for line in summary)
    assert "lab table --device cuda" in called[-1]
    assert "--preset small" in called[-1]
    for suite in SUITES:
        assert any(f"fst_fast.bench {suite} --device cuda" in line for line in called)
    assert sum(line.startswith("--tool") for line in called) == 8
    # What is there already is not done again, unless that is asked for.
    assert call() == (0, summary, [])
    assert len(call(REDO="1")[2]) == len(called)


def test_a_failed_part_is_said_and_run_again(call):
    status, summary, called = call(FAIL="fst_fast.bench inject")
    assert status == 1
    assert [line for line in summary if "exit status 3" in line] == [
        line for line in summary if line.startswith("bench-inject: ")
    ]
    # The parts behind it ran all the same.
    assert any("fst_fast.bench end2end" in line for line in called)
    status, summary, called = call()
    assert status == 0
    assert len(called) == 1
    assert "bench inject" in called[0]
    assert not any("exit status 3" in line for line in summary)


def test_what_a_machine_lacks_is_left_out(call):
    status, summary, called = call(FAIL="import sklearn")
    assert status == 0
    assert "bench-end2end: left out: needs scikit-learn, or DATA" in summary
    assert "efficacy: left out: needs scikit-learn, or DATA" in summary
    assert not any("end2end" in line or "lab table" in line for line in called)


def test_with_data_a_network_of_full_size_is_tuned(call):
    status, summary, called = call(DATA="cifar", FAIL="import sklearn")
    assert status == 0
    assert not any("left out" in line for line in summary)
    line = next(line for line in called if "bench end2end" in line)
    assert "--checkpoint cifar10-resnet18 --data cifar" in line
    assert "lab table" in called[-1]
    assert "--preset full --data cifar" in called[-1]


def test_the_order_of_the_parts(call):
    _, summary, _ = call()
    names = [line.partition(":")[0] for line in summary]
    kinds = [name.partition("-")[0] for name in names]
    assert list(dict.fromkeys(kinds)) == [
        "build",
        "info",
        "tests",
        "sanitizer",
        "bench",
        "efficacy",
    ]


def test_parts_can_be_chosen(call):
    status, summary, called = call(PARTS="bench-loop tests")
    assert status == 0
    assert [line.partition(":")[0] for line in summary] == ["tests", "bench-loop"]
    assert len(called) == 2
    assert call(PARTS="bench-lop")[::2] == (1, [])
    # What was done stays done.
    assert len(call(PARTS="bench-loop bench-head")[2]) == 1


def test_the_whole_has_a_limit(call):
    status, summary, called = call(HANG="fst_fast info", BUDGET="2")
    assert status == 1
    assert any(line.startswith("info: exit status 124, ") for line in summary)
    assert "tests: not run, no time left; run again to go on" in summary
    assert len(called) == 2
