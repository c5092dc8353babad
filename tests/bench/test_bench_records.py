"""What the benchmark suite writes down, measures of memory, and says of wrong arguments."""

import contextlib
import io
import json
import os
import subprocess

import pytest
import record_files
import tables
import torch

from fst_fast.bench import __main__ as bench
from fst_fast.bench import cases, head, machine, memory, records
from fst_fast.cli import main as cli

CPU = torch.device("cpu")
SHAPE = ["--shapes", "5,7,3", "--seconds", "0.01", "--quick"]
ON_LINUX = pytest.mark.skipif(not memory.CLEAR.exists(), reason="memory is read from Linux's /proc")
TIMES = {"p20_us", "p50_us", "p80_us", "host_p50_us", "samples", "rounds"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One real run, small: its record's path, and what went to the standard output."""
    folder = tmp_path_factory.mktemp("results")
    chosen = ["--variants", "reference,cpu", "--threads", "1", "--device", "cpu"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert bench.main(["head", *SHAPE, *chosen, "--record", str(folder)]) == 0
    (path,) = folder.rglob("*.json")
    return path, text.getvalue()


def test_record_has_all_that_a_number_needs(recorded):
    path, _ = recorded
    record = json.loads(path.read_text())
    commit = (record["commit"] or "unknown")[:7]
    assert path.parent.name == "cpu"
    assert path.name == f"{record['date']}-{commit}-head.json"
    assert {"torch", "fst_fast", "python", "platform"} <= set(record["versions"])
    assert set(record["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert record["device"]["name"]
    assert record["settings"] == {"variants": ["reference", "cpu"], "seconds": 0.01, "quick": True}
    assert len(record["load_average"]["before"]) == len(record["load_average"]["after"]) == 3
    (rates,) = record["machine"]
    assert rates["threads"] == 1
    assert min(rates.values()) > 0
    described = [(case["op"], case["shape"], case["dtype"]) for case in record["cases"]]
    loss = "head_deviation_loss"
    assert described == [
        (loss, [5, 7, 3], "fp32"),
        (loss, [5, 7, 3], "bf16"),
        ("head_step_", [3, 7], "fp32"),
    ]


def test_each_row_has_times_errors_and_memory(recorded):
    for case in json.loads(recorded[0].read_text())["cases"]:
        names = [row["variant"] for row in case["variants"]]
        assert names[:2] == ["eager", "reference"]
        assert case["refused"] == []
        assert case["threads"] == 1
        assert case["floor"]["us"] > 0
        for row in case["variants"]:
            assert set(row) >= TIMES
            assert set(row["hot"]) >= TIMES
            assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
            assert row["rounds"] >= 3
            eager = case["variants"][0]
            expected = eager["p50_us"] / row["p50_us"]
            assert row["speedup_over_eager"] == pytest.approx(expected)
            assert set(row["errors"]) == set(eager["errors"])
            assert max(row["errors"].values()) < 0.1
            if memory.CLEAR.exists():
                assert row["peak_extra_bytes"] >= 0


def test_people_get_a_plain_table_where_there_is_no_terminal(recorded):
    _, text = recorded
    assert "5,7,3 bf16, 1 thread" in text
    assert "reference" in text
    assert "floor" in text
    assert "\x1b" not in text
    assert "…" not in text


def test_record_is_all_or_nothing(tmp_path, monkeypatch):
    record = {"commit": None, "date": "2026-01-02", "suite": "head", "device": {"type": "cpu"}}
    path = records.write(record, tmp_path)
    assert path == tmp_path / "cpu" / "2026-01-02-unknown-head.json"

    def failing(source, target):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="no room"):
            records.write({**record, "more": 1}, tmp_path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text()) == record


def test_a_record_that_is_there_stays(tmp_path):
    record = {"commit": "a" * 40, "date": "2026-01-02", "suite": "head", "device": {"type": "cpu"}}
    paths = [records.write({**record, "number": n}, tmp_path) for n in (1, 2, 3)]
    assert [path.name for path in paths] == [
        "2026-01-02-aaaaaaa-head.json",
        "2026-01-02-aaaaaaa-2-head.json",
        "2026-01-02-aaaaaaa-3-head.json",
    ]
    assert [json.loads(path.read_text())["number"] for path in paths] == [1, 2, 3]


def git(folder, *arguments):
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    for name in ("fst_fast/__init__.py", "benchmarks/results/old.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    git(tmp_path, "init")
    return tmp_path


def test_dirty_is_about_the_sources(repository):
    git(repository, "add", ".")
    git(repository, "commit", "-m", "x")
    found = records.sources(repository)
    assert len(found["commit"]) == 40
    assert found["dirty"] is False
    (repository / "benchmarks" / "results" / "new.json").write_text("y")
    assert records.sources(repository) == found
    (repository / "csrc").mkdir()
    (repository / "csrc" / "new.cpp").write_text("y")
    assert records.sources(repository) == {**found, "dirty": True}
    (repository / "csrc" / "new.cpp").unlink()
    (repository / "fst_fast" / "__init__.py").write_text("y")
    assert records.sources(repository)["dirty"] is True


def test_commit_is_null_without_git_or_inside_anothers_checkout(repository, tmp_path_factory):
    nothing = {"commit": None, "dirty": None}
    assert records.sources(tmp_path_factory.mktemp("installed")) == nothing
    git(repository, "add", "benchmarks")
    git(repository, "commit", "-m", "x")
    assert records.sources(repository) == nothing


@ON_LINUX
def test_memory_sees_the_logits_and_what_is_kept():
    # 16 MB of logits; eager holds them, their softmax and a gradient.
    case = cases.LossCase(1000, 8, 4000, "fp32")
    with memory.Child() as child:
        eager, _ = child.peak(case, "eager", threads=1)
        assert 2 < eager / case.yardstick_bytes < 5
        step, kept = child.peak(cases.StepCase(1000, 512), "eager", threads=1)
        assert step < 2e6
        assert kept < 2e6
        with pytest.raises(RuntimeError, match="ValueError"):
            child.peak(case, "no such variant", threads=1)
        # It is still there.
        assert child.peak(cases.StepCase(10, 8), "eager", threads=1)[0] < 2e6


@ON_LINUX
def test_a_dead_child_is_said_and_the_next_one_started(monkeypatch):
    case = cases.StepCase(2, 3)
    monkeypatch.setitem(memory.CHILD_ENVIRONMENT, "PYTHONHOME", "/nowhere")
    with memory.Child() as child:
        with pytest.raises(RuntimeError, match="ended with status 1"):
            child.peak(case, "eager", threads=1)
        monkeypatch.delitem(memory.CHILD_ENVIRONMENT, "PYTHONHOME")
        assert child.peak(case, "eager", threads=1)[0] >= 0


def test_machine_is_measured():
    rates = machine.rates(CPU, quick=True)
    dtypes = ("fp32", "bf16", "fp32_conv", "bf16_conv")
    assert set(rates) == {"copy_gb_per_s", *(f"{dtype}_gflop_per_s" for dtype in dtypes)}
    # A machine of this century, and no supercomputer.
    assert 0.1 < rates["copy_gb_per_s"] < 1e4
    assert 0.1 < rates["fp32_gflop_per_s"] < 1e5
    assert 0.1 < rates["fp32_conv_gflop_per_s"] < 1e5


def test_threads_are_put_back(monkeypatch):
    monkeypatch.setattr(
        machine, "rates", lambda device, quick: {"copy_gb_per_s": 1.0, "fp32_gflop_per_s": 1.0}
    )
    before = torch.get_num_threads()
    settings = head.Settings(device=CPU, cases=[cases.StepCase(2, 3)], threads=[before + 1])
    monkeypatch.setattr(head, "measure_case", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        head.run(settings, say=lambda text: None)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["tail"], 2, "invalid choice: 'tail' (choose from"),
        (["head", "--shapes", "128x512x10"], 2, "a shape must be B,D,K like 128,512,10"),
        (["head", "--shapes", "0,512,10"], 2, "at least 1,1,1"),
        (["head", "--dtype", "fp8"], 2, "must be among fp32, bf16, got 'fp8'"),
        (["head", "--threads", "two"], 2, "must be int separated by commas, got 'two'"),
        (["head", "--threads", "0"], 1, "--threads must be at least 1, got 0"),
        (["head", "--seconds", "0"], 1, "--seconds must be more than 0, got 0"),
        (["head", "--variants", "egaer"], 1, "--variants must be among eager, "),
    ],
)
@pytest.mark.parametrize("command", ["module", "fst-fast"])
def test_wrong_arguments(capsys, command, arguments, status, message):
    main = bench.main if command == "module" else lambda rest: cli.main(["bench", *rest])
    try:
        got = main(arguments)
    except SystemExit as stop:
        got = stop.code
    assert got == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys):
    assert bench.main(["head", "--device", "cuda"]) == 1
    assert "--device cuda needs a GPU" in capsys.readouterr().err


# The documents' tables


def test_tables_say_what_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "RESULTS", tmp_path)
    assert tables.head() == "Not yet measured on a CPU.\n\nNot yet measured on a GPU."


def test_tables_take_the_newest_record(recorded, tmp_path, monkeypatch):
    record = json.loads(recorded[0].read_text())
    monkeypatch.setattr(record_files, "RESULTS", tmp_path)
    records.write({**record, "commit": "a" * 40, "time": "2026-01-01T10:00:00+00:00"}, tmp_path)
    # Earlier, though its name comes last.
    old = {**record, "commit": "f" * 40, "time": "2026-01-01T09:00:00+00:00", "cases": []}
    records.write(old, tmp_path)
    text = tables.head()
    assert "aaaaaaa" in text
    assert "fffffff" not in text
    assert "Not yet measured on a GPU." in text
    lines = [line for line in text.splitlines() if line.startswith("| 5, 7, 3 |")]
    assert len(lines) == 2
    assert "(reference)" in lines[0] or "(cpu)" in lines[0]
    assert "| 3, 7 |" in tables.head_step()


def test_a_case_that_the_newest_record_lacks_is_an_older_ones(recorded, tmp_path, monkeypatch):
    record = json.loads(recorded[0].read_text())
    monkeypatch.setattr(record_files, "RESULTS", tmp_path)
    loss = [case for case in record["cases"] if case["op"] == "head_deviation_loss"]
    old = {**record, "commit": "b" * 40, "time": "2026-01-01T09:00:00+00:00", "cases": loss}
    new = {**old, "commit": "c" * 40, "time": "2026-01-01T10:00:00+00:00", "cases": loss[:1]}
    for made in (old, new):
        records.write(made, tmp_path)
    first, second = tables.head().split("ccccccc")[1].split("bbbbbbb")
    assert "| 5, 7, 3 | fp32 |" in first
    assert "| bf16 |" not in first
    assert "| 5, 7, 3 | bf16 |" in second
    assert "| fp32 |" not in second


def test_tables_show_where_ours_is_missing(recorded, tmp_path, monkeypatch):
    record = json.loads(recorded[0].read_text())
    monkeypatch.setattr(record_files, "RESULTS", tmp_path)
    for case in record["cases"]:
        case["variants"] = [row for row in case["variants"] if not row["ours"]]
    records.write({**record, "device": {"type": "cuda", "name": "some GPU"}}, tmp_path)
    text = tables.head()
    assert "some GPU" in text
    assert "refused or not available" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in lines} == {len(tables.BENCH_HEADER) - 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_a_gpu(capsys):
    assert bench.main(["head", *SHAPE, "--device", "cuda", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    for case in record["cases"]:
        names = {row["variant"] for row in case["variants"]}
        assert {"eager", "eager_graph", "triton", "triton_graph"} <= names, case["refused"]
        assert all(row["host_p50_us"] > 0 for row in case["variants"])
        assert all(row["peak_extra_bytes"] >= 0 for row in case["variants"])
