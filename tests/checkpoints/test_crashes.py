"""Kills, full disks and Ctrl-C: a part of make hostile, and that its tools find planted faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import crashes, records

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")


def test_nothing_done_is_lost():
    """Kills at random moments, at every write of a run's state, and at every write of a model."""
    table = crashes.rows(full=False)
    assert [row for row in table if not records.within(row)] == []
    assert [row["count"] > 5 for row in table] == [True] * 3


PLANTED = """
import os, tempfile
from hostile import crashes, injector
from fst_fast.tuning import resume

def in_place(path, data):
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "wb") as file:
        file.write(data)

def write_in_place():
    resume.replace_file = in_place

def forget():
    keep = resume.RunFolder.keep
    resume.RunFolder.keep = lambda self, tuner: len(tuner.history) > 2 or keep(self, tuner)

with tempfile.TemporaryDirectory() as root:
    crashes.tune(crashes.make_batches(1), epochs=1)
    run = crashes.Run(root, epochs=1, plant=write_in_place)
    print(*crashes.writes_of_a_run(run))
    run = crashes.Run(root, epochs=3, plant=forget)
    print(run.struck(after_epoch=crashes.at_epoch(3, injector.die)))
"""


def test_planted_faults_are_found():
    here = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{here / 'support'}"}
    command = [sys.executable, "-c", PLANTED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    in_place, forgetful = result.stdout.splitlines()
    assert "unreadable" in in_place
    assert forgetful == "1 epochs lost"
