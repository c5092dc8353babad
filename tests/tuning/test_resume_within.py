"""A run interrupted within an epoch goes on at that very step, to the same bits."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
from purify_cases import assert_same_run, make_batches, make_model, quick
from test_resume import LOADERS, METHODS
from torch import nn

from fst_fast.tuning import step
from fst_fast.tuning.resume import NAME


class Interrupting(nn.Module):
    """Sends Ctrl-C while it computes its n-th step; draws random numbers on the way."""

    def __init__(self, at=None, number=signal.SIGINT):
        super().__init__()
        self.net = make_model()
        self.net.insert(4, nn.Dropout(0.3))
        self.at, self.number, self.steps = at, number, 0

    def forward(self, x):
        if x.requires_grad or self.training:
            self.steps += 1
            if self.steps == self.at:
                signal.raise_signal(self.number)
        return self.net(x)


def where(folder):
    with safetensors.safe_open(folder / NAME, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    position = facts["position"]
    assert position["epoch"] == len(facts["history"])
    return position["epoch"], (position["step"], position["images"])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lp"])
@pytest.mark.parametrize("loader", LOADERS)
def test_the_same_bits_wherever_it_was_interrupted(tmp_path, loader, method):
    settings = {"epochs": 3 if method != "auto" else 1, **METHODS[method]}
    whole = quick(Interrupting(), LOADERS[loader](), **settings)
    # Epochs of three or four steps; in "auto" the first are of the head alone.
    for at in (1, 3, 4, 6, 7):
        folder = tmp_path / str(at)
        ended = quick(Interrupting(at), LOADERS[loader](), resume=folder, **settings)
        if ended.stopped is None:
            continue
        again = quick(Interrupting(), LOADERS[loader](), resume=folder, **settings)
        assert_same_run(again, whole)
    assert where(tmp_path / "1") == (len(whole.history), (0, 0))


def test_interrupted_again_and_again(tmp_path):
    whole = quick(Interrupting(), make_batches(), alpha=0.1, epochs=4)
    places = []
    for _ in range(20):
        run = quick(Interrupting(1), make_batches(), alpha=0.1, epochs=4, resume=tmp_path)
        places.append(where(tmp_path))
        if run.stopped is None:
            break
    assert places[:4] == [(0, (1, 8)), (0, (2, 16)), (0, (3, 24)), (1, (1, 8))]
    assert_same_run(run, whole)


def test_goes_on_where_it_was_and_not_at_the_epoch_s_start(tmp_path):
    quick(Interrupting(5), make_batches(), alpha=0.1, epochs=3, resume=tmp_path)
    assert where(tmp_path) == (1, (2, 16))
    model = Interrupting()
    quick(model, make_batches(), alpha=0.1, epochs=3, resume=tmp_path, inplace=True)
    assert model.steps == 9 - 5


def test_a_deferred_head_goes_on_from_the_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "DEFERRED_FROM", 1)
    whole = quick(Interrupting(), make_batches(), alpha=0.1, epochs=3)
    quick(Interrupting(5), make_batches(), alpha=0.1, epochs=3, resume=tmp_path)
    assert where(tmp_path) == (1, (0, 0))
    again = quick(Interrupting(), make_batches(), alpha=0.1, epochs=3, resume=tmp_path)
    assert_same_run(again, whole)


CHILD = """
import signal, sys
sys.path[:0] = sys.argv[2].split(":")
from purify_cases import make_batches, quick
from test_resume_within import Interrupting

quick(
    Interrupting(5, signal.SIGTERM),
    make_batches(),
    alpha=0.1,
    epochs=3,
    threads=1,
    resume=sys.argv[1] if sys.argv[3] == "kept" else None,
)
print("went on")
"""


@pytest.mark.parametrize("kept", ["kept", "not kept"])
def test_sigterm_ends_the_process_with_the_state_on_the_disk(tmp_path, kept):
    here = Path(__file__).parent
    paths = f"{here}:{here.parent / 'support'}"
    command = [sys.executable, "-c", CHILD, str(tmp_path), paths, kept]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert child.stdout == ""
    if kept != "kept":
        # Nothing of ours stands in the way.
        assert child.returncode == -signal.SIGTERM
        return
    assert child.returncode == 128 + signal.SIGTERM
    assert where(tmp_path) == (1, (2, 16))
    # As many threads as the child had: they are part of the bits.
    again, whole = (
        quick(Interrupting(), make_batches(), alpha=0.1, epochs=3, threads=1, resume=folder)
        for folder in (tmp_path, None)
    )
    assert_same_run(again, whole)


def test_a_handler_of_the_program_s_own_is_left_alone(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        model = Interrupting(2, signal.SIGTERM)
        result = quick(model, make_batches(), alpha=0.1, resume=tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1]
    assert result.stopped is None


def test_a_fault_behind_an_interruption_is_told_and_not_kept(tmp_path):
    def spoiled(at, value):
        """Finite, and too much for the first convolution; the batch is counted over all epochs."""
        count = [0]

        def loader():
            for images, labels in make_batches():
                count[0] += 1
                yield (images * value if count[0] == at else images), labels

        return loader

    settings = {"alpha": 0.1, "epochs": 3, "resume": tmp_path}
    # One more is drawn up front.
    quick(Interrupting(4), spoiled(99, 1.0), **settings)
    assert where(tmp_path) == (1, (1, 8))
    before = (tmp_path / NAME).read_bytes()
    ended = quick(Interrupting(2), spoiled(1 + 3, 3e37), **settings)
    assert "not finite at epoch 2, step 3" in ended.stopped
    assert (tmp_path / NAME).read_bytes() == before
