"""``make gpu-check`` with a Python that does next to nothing: what it runs, resuming and limits."""

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu_probe
import pytest

from fst_fast.bench import inject_peers, ladder, options, peers

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
# Writes down what it is asked; a benchmark leaves a record, the probe its file.
FAKE = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$LOG"; echo >>"$LOG"
case "$*" in *"$FAIL"*) [ -z "$FAIL" ] || exit 3 ;; esac
case "$*" in *"$HANG"*) [ -z "$HANG" ] || exec sleep 60 ;; esac
if [ "$2" = fst_fast.bench ]; then
  folder=$(printf '%s\\n' "$@" | grep -A1 -x -e --record | tail -n 1)
  mkdir -p "$folder/cuda" && echo "$3" >"$folder/cuda/$3.json"
elif [ "$1" = benchmarks/gpu_probe.py ]; then
  echo probed >"$2/probe.json"
fi
"""
HEAD_OPS = {
    f"tests/ops/test_head_{name}.py" for name in ("step", "step_deferred", "deviation_loss")
}
INJECT = "tests/ops/test_inject.py"
SETTINGS = ("CALL", "PARTS", "BUDGET", "DEVICE", "ARCHIVE", "REDO", "OUT")
A = ["build", "info", "probe", "tests-cuda"]
A += [f"bench-{suite}" for suite in ("head", "loop", "inject", "evaluate")]
B = ["build", "tests-triton", "memcheck", "racecheck", "memcheck-inject", "racecheck-inject"]
B += ["bench-head-fp32", "bench-end2end"]


@pytest.fixture
def call(tmp_path):
    """Runs the script; returns the exit status, the summary by part, and what was called."""
    tools, log, out = tmp_path / "bin", tmp_path / "log", tmp_path / "out"
    tools.mkdir()
    for name in ("python", "compute-sanitizer"):
        (tools / name).write_text(FAKE)
        (tools / name).chmod(0o755)

    def run(**settings):
        log.write_text("")
        environment = {
            **{
                name: v for name, v in os.environ.items() if name not in ("CALL", "PARTS", "BUDGET")
            },
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(tools / "python"),
            **{"LOG": str(log), "FAIL": "", "HANG": "", "DATA": ""},
            **settings,
        }
        ended = ["timeout", environment.pop("SECONDS_LEFT", "300")]
        command = [*ended, "bash", str(SCRIPT), str(out)]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment
        )
        called = [shlex.split(line) for line in log.read_text().splitlines()]
        called = [line for line in called if line[0] != "-c"]
        lines = (out / "summary.txt").read_text().splitlines()
        summary = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}
        if result.returncode != 124:
            assert result.stdout.splitlines()[-1].startswith("summary: ")
        return result.returncode, summary, called

    return run


def files_of(path):
    with tarfile.open(path) as archive:
        return {name[2:] for name in archive.getnames()}


@pytest.mark.parametrize(("name", "parts"), [("A", A), ("B", B)])
def test_a_call_runs_its_parts_once_in_order(call, name, parts):
    status, summary, called = call(CALL=name)
    assert status == 0
    assert list(summary) == parts
    assert all(said.startswith("exit status 0, ") for said in summary.values())
    assert len(called) == len(parts)
    # What is there already is not done again, but for the build, unless that is asked for.
    assert call(CALL=name) == (0, summary, called[:1])
    assert len(call(CALL=name, REDO="1")[2]) == len(called)


def test_without_a_call_both_are_done(call):
    status, summary, _ = call()
    assert status == 0
    assert list(summary) == [*A, *B[1:]]


def test_all_results_are_in_one_file(call, tmp_path):
    call(CALL="A", ARCHIVE=str(tmp_path / "kept.tgz"))
    assert not (tmp_path / "out" / "all.tgz").exists()
    records = {f"cuda/{suite}.json" for suite in ("head", "loop", "inject", "evaluate")}
    logs = {f"{part}.log" for part in A}
    kept = files_of(tmp_path / "kept.tgz")
    assert records | logs | {"probe.json", "summary.txt"} <= kept
    call(CALL="B")
    assert {"cuda/end2end.json", "racecheck.log"} <= files_of(tmp_path / "out" / "all.tgz")


def test_what_is_cut_off_has_kept_the_parts_before(call, tmp_path):
    assert call(CALL="A", HANG="-m pytest", SECONDS_LEFT="3")[0] == 124
    kept = files_of(tmp_path / "out" / "all.tgz")
    assert {"build.log", "probe.json"} <= kept
    assert "bench-head.log" not in kept


def test_a_failed_part_is_said_and_run_again(call):
    status, summary, called = call(CALL="A", FAIL="fst_fast.bench inject")
    assert status == 1
    failed = [name for name, said in summary.items() if said.startswith("exit status 3")]
    assert failed == ["bench-inject"]
    # The parts behind it ran all the same.
    assert len(called) == len(A)
    status, summary, called = call(CALL="A")
    assert status == 0
    assert [line[:3] for line in called[1:]] == [["-m", "fst_fast.bench", "inject"]]


def test_a_failed_build_does_not_end_the_call(call):
    status, summary, called = call(CALL="A", FAIL="gpu_bundle")
    assert status == 1
    assert summary["build"].startswith("exit status 3")
    assert len(called) == len(A)


def test_what_a_machine_lacks_is_left_out(call):
    status, summary, called = call(CALL="C", FAIL="import sklearn")
    assert status == 0
    for name in ("full-end2end", "efficacy"):
        assert summary[name] == "left out: needs scikit-learn, or DATA"
    assert not any({"end2end", "lab"} & set(line) for line in called)


def test_the_long_call(call):
    _, summary, called = call(CALL="C")
    kinds = [name.partition("-")[0] for name in summary]
    assert list(dict.fromkeys(kinds)) == ["build", "tests", "sanitizer", "full", "efficacy"]
    assert sum(line[0] == "--tool" for line in called) == 8
    assert called[-1][:4] == ["-m", "fst_fast", "lab", "table"]
    assert called[-1][-2:] == ["--preset", "small"]


def test_with_data_a_network_of_full_size_is_tuned(call):
    status, summary, called = call(CALL="C", DATA="cifar", FAIL="import sklearn")
    assert status == 0
    assert not any("left out" in said for said in summary.values())
    line = next(" ".join(line) for line in called if "end2end" in line)
    assert "--checkpoint cifar10-resnet18 --data cifar" in line
    assert "--preset full --data cifar" in " ".join(called[-1])


def test_parts_can_be_chosen(call):
    status, summary, called = call(PARTS="bench-loop racecheck")
    assert status == 0
    assert list(summary) == ["bench-loop", "racecheck"]
    assert len(called) == 2
    assert call(PARTS="bench-lop")[::2] == (1, [])
    # What was done stays done.
    assert len(call(PARTS="bench-loop bench-head")[2]) == 1


def test_an_unknown_call_is_refused(call):
    status, summary, _ = call(CALL="D")
    assert status == 1
    assert list(summary) == ["build"]


def test_the_whole_has_a_limit(call):
    status, summary, called = call(CALL="A", HANG="fst_fast info", BUDGET="2")
    assert status == 1
    assert summary["info"].startswith("exit status 124, ")
    assert summary["tests-cuda"] == "not run, no time left; run again to go on"
    assert len(called) == 2


def test_every_benchmark_is_one_that_bench_takes(call, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(ladder, "resolve_precision", lambda *_: "bf16")
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    seen = []
    for name in "ABC":
        for line in call(CALL=name)[2]:
            if line[:2] == ["-m", "fst_fast.bench"]:
                chosen = parser.parse_args(line[2:])
                seen.append(options.make_settings(chosen, chosen.suite))
    assert len(seen) == 11
    assert {"cuda", "cuda_graph"} <= set(peers.known()) & set(inject_peers.known())


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("tests-cuda", {*HEAD_OPS, INJECT, "tests/tuning/test_graphs_gpu.py"}),
        ("memcheck", HEAD_OPS),
        ("racecheck-inject", {INJECT}),
    ],
)
def test_every_op_is_among_the_tests_that_are_selected(call, name, files):
    (line,) = call(PARTS=name, DEVICE="cpu")[2]
    command = [sys.executable, "-m", *line[line.index("pytest") :], "--collect-only"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    found = {test.partition("::")[0] for test in result.stdout.splitlines() if "::" in test}
    assert files <= found, result.stdout + result.stderr
    assert not any("emulated" in file or "contract" in file for file in found)


def test_the_probe_writes_what_it_finds(tmp_path):
    failed = gpu_probe.main([str(tmp_path), "--width", "1", "--images", "128"])
    found = json.loads((tmp_path / "probe.json").read_text())
    assert not failed, found
    for run in found["set_up"]:
        assert run["absent"] == []
        assert 0 < run["seconds before the first step"] < run["seconds"]
        assert run["seconds of parts"]["find_head"]
    assert found["kernels"]["longest"][0]["us"] > 0


def test_the_probe_goes_on_behind_a_failure(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("broken on purpose")

    for name in gpu_probe.MEASUREMENTS:
        monkeypatch.setattr(gpu_probe.Probe, name, lambda self: "found")
    monkeypatch.setattr(gpu_probe.Probe, "set_up", fail)
    assert gpu_probe.main([str(tmp_path)]) == 1
    found = json.loads((tmp_path / "probe.json").read_text())
    assert "broken on purpose" in found["set_up"]["failed"]
    assert found["runs"] == "found"


@pytest.mark.parametrize("place", [*gpu_probe.TIMED, gpu_probe.FIRST_STEP])
def test_what_the_probe_times_is_there(place):
    module, _, path = place.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    assert callable(found)
