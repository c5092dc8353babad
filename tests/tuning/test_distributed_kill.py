"""A rank that is killed at any moment: the others end with one error, and nothing kept is lost.

``FST_FAST_KILLS=10`` kills more often.
"""

import os
import random
import time

import pytest
import rank_cases
from rank_pool import RankPool

KILLS = int(os.environ.get("FST_FAST_KILLS", "2"))
EPOCHS = 30


@pytest.fixture(scope="module")
def whole():
    return rank_cases.kept_in(None, EPOCHS)


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("turn", range(KILLS))
def test_a_killed_rank_loses_nothing(tmp_path, whole, turn):
    folder, victim = tmp_path / "run", turn % 2
    pool = RankPool(2, seconds=20)
    try:
        pool.begin(rank_cases.kept_in, str(folder), EPOCHS)
        wait_for((folder / "state.safetensors").exists)
        time.sleep(random.Random(turn).uniform(0, 0.5))
        pool.processes[victim].kill()
        killed = time.monotonic()
        result, why = pool.answer(1 - victim, seconds=30)
        waited = time.monotonic() - killed
    finally:
        pool.close()
    assert result is None, "the run was over before the rank was killed: give it more epochs"
    name, words = why
    assert name == "LostRankError"
    assert words.startswith("purify: the ranks must go on together, but another rank ended or did")
    assert "what resume= had kept stays" in words
    assert waited < 20
    assert [path.name for path in folder.iterdir()] == ["state.safetensors"]
    resumed = rank_cases.kept_in(str(folder), EPOCHS)
    assert rank_cases.furthest(resumed, whole) <= 1e-5
    assert len(resumed["losses"]) == EPOCHS
