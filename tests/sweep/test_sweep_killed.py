"""A sweep killed at random moments ends with the table, and the weights, of one left alone.

``FST_FAST_FULL_SWEEP=1`` adds 12 checkpoints x 3 methods, killed five times.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from sweep_cases import table, write_sweep

from fst_fast import checkpoints
from fst_fast.sweep import run_sweep

# Checkpoints, methods, kills, epochs.
CASES = {"small": (3, ["ft", "fst"], 2, 3)}
if os.environ.get("FST_FAST_FULL_SWEEP"):
    CASES["full"] = (12, ["ft", "fst", "lp"], 5, 10)


def start(config, **environment):
    command = [sys.executable, "-m", "fst_fast", "sweep", str(config), "--quiet"]
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(out):
    return len(list(out.glob("cells/*/purified.json")))


def kill_after(child, out, cells, seconds):
    """Kill once so many cells are finished and so much time has passed; whether it still ran."""
    while child.poll() is None and finished(out) < cells:
        time.sleep(0.005)
    time.sleep(seconds)
    alive = child.poll() is None
    child.kill()
    child.communicate()
    return alive


def weights(out):
    return {
        path.parent.name: checkpoints.sha256(path)
        for path in sorted(out.glob("cells/*/purified.safetensors"))
    }


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("case", CASES)
def test_the_same_table_however_often_it_is_killed(tmp_path, case):
    checkpoints, methods, kills, epochs = CASES[case]
    settings = {"checkpoints": checkpoints, "methods": methods, "epochs": epochs}
    alone = write_sweep(tmp_path / "alone", **settings)
    assert run_sweep(alone, quiet=True) == 0
    expected, total = table(alone.parent / "out"), checkpoints * len(methods)
    assert len(expected) == total

    config = write_sweep(tmp_path / "killed", **settings)
    out = config.parent / "out"
    drawn = random.Random(3)
    moments = sorted(drawn.sample(range(total - 2), kills))
    for cells in moments:
        assert kill_after(start(config), out, cells, 0.1 * drawn.random())
        print(f"killed with {finished(out)} of {total} cells finished")
    done = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/purified.json")}
    assert len(done) < total

    child = start(config)
    text, _ = child.communicate()
    assert child.returncode == 0, text
    assert table(out) == expected
    assert weights(out) == weights(alone.parent / "out")
    # What was finished was not done again, and nothing lies about.
    assert all(path.stat().st_mtime_ns == changed for path, changed in done.items())
    assert not [path for path in out.rglob("*") if path.name == "run" or path.suffix == ".tmp"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_two_processes_share_the_cells_and_one_may_die(tmp_path):
    config = write_sweep(tmp_path / "shared", checkpoints=3, epochs=3)
    out = config.parent / "out"
    ranks = [
        start(config, RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2", OMP_NUM_THREADS="1")
        for i in range(2)
    ]
    # The one that is to survive shows the table.
    while ranks[0].poll() is None and not finished(out):
        time.sleep(0.005)
    ranks[1].send_signal(signal.SIGKILL)
    text, _ = ranks[0].communicate()
    ranks[1].communicate()
    assert ranks[0].returncode == 0, text
    alone = write_sweep(tmp_path / "alone", checkpoints=3, epochs=3)
    assert run_sweep(alone, quiet=True) == 0
    assert table(out) == table(alone.parent / "out")
    assert "6 cells, 0 failed" in text
