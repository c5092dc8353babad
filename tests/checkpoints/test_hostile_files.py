"""A short part of ``make hostile`` for every run; and each tool sees a fault that is planted."""

import os
import pickle
import time

import pytest
from hostile import bombs, files, fuzz, pickles, records, targets

from fst_fast.checkpoints import pickle_reader, read


def test_the_suite_in_short(capfd):
    rows = files.rows(full=False)
    assert [row for row in rows if not records.within(row)] == [], capfd.readouterr().out
    assert len(rows) > 10


def test_there_is_enough_of_it():
    assert len(pickles.kinds()) >= 60
    assert len({make("x") for make in pickles.kinds().values()}) >= 100
    assert len(bombs.kinds()) >= 50


def test_most_hostile_pickles_would_run_in_a_plain_reader(tmp_path):
    """By these the canary is shown to work."""
    for name in ("os.system", "exec", "eval", "open", "io.FileIO", "functools.reduce"):
        canary = tmp_path / name
        pickle.loads(pickles.whole(pickles.call(*pickles.CALLS[name](str(canary)))))
        assert canary.exists(), name
    for name in ("OBJ", "STACK_GLOBAL", "STACK_GLOBAL from the memo", "protocol 0", "a frame"):
        canary = tmp_path / name.replace(" ", "-")
        pickle.loads(pickles.FORMS[name](str(canary)))
        assert canary.exists(), name


# Planted faults


def test_code_that_ran_and_files_let_through_are_counted(tmp_path, monkeypatch):
    def plain(path):
        return pickle.loads(path.read_bytes())

    monkeypatch.setattr(files, "read_state_dict", plain)
    monkeypatch.setattr(pickles, "kinds", lambda: {"x": lambda c: (pickles.FORMS["OBJ"](c), ".pt")})
    ran, not_refused = files.pickle_rows(tmp_path, 1)
    assert (ran["found"], not_refused["found"]) == (1, 1)


def test_memory_is_seen(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(files, "read_state_dict", lambda path: kept.append(b"x" * 400_000_000))
    monkeypatch.setattr(files, "reader_peak", lambda folder: 0)
    monkeypatch.setattr(bombs, "kinds", lambda: {"x": (lambda: b"", ".safetensors")})
    not_refused, memory = files.bomb_rows(tmp_path, 1)
    assert not_refused["found"] == 1
    assert memory["found"] > 300
    assert not records.within(memory)


def test_a_reader_s_memory_is_seen(tmp_path):
    base = files.reader_peak(tmp_path)
    (tmp_path / "m.pt").write_bytes(pickles.archive(pickles.MARK * 2_000_000))
    assert files.verdict(tmp_path / "m.pt") == "refused"
    assert 20e6 < files.reader_client.peak_bytes() - base < 256e6


def test_a_flip_that_is_not_found_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(read.manifest, "check", lambda path: read.manifest.Checked(None))
    payload, beside = files.flip_rows(tmp_path, (1,))
    assert 0 < payload["found"] < payload["count"]
    assert beside["found"] == beside["count"]


def planted(fault):
    """A parser with a fault where a mutation begins with an odd byte."""

    def parse(data):
        if data[:1] and data[0] & 1:
            fault()
        raise ValueError

    return fuzz.Target("planted", parse, [bytes(range(2, 60))], (ValueError,))


def test_a_crash_is_found():
    found = fuzz.run(planted(os.abort), 300)
    assert found.crashes
    assert not found.hangs
    assert not found.foreign


def test_a_hang_is_found():
    target = planted(lambda: time.sleep(60))
    target.seeds[:] = [b"\x02" * 4000, b"\x02" * 4000, b"\x03"]
    found = fuzz.run(target, 6, seconds=0.3)
    assert found.hangs
    assert not found.crashes


def test_a_foreign_exception_is_found_and_found_again():
    target = planted(lambda: {}["x"])
    found = fuzz.run(target, 300)
    assert found.foreign
    assert len(found.faults) < 300
    number, text = found.foreign[0]
    assert text.startswith("KeyError")
    with pytest.raises(KeyError):
        target.parse(fuzz.mutate(target.seeds, number))


def test_what_is_accepted_wrongly_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "fault", lambda value: None)
    assert fuzz.run(targets.safetensors_files(tmp_path), 400).foreign


def test_a_leak_in_the_reader_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_reader, "_explain", lambda error: error)
    assert fuzz.run(targets.pickled(tmp_path), 60).foreign


def test_every_seed_is_accepted(tmp_path):
    """Else the mutations are refused for what no mutation did."""
    made = [targets.safetensors_files, targets.pickled, targets.manifests, targets.run_states]
    for target in [*(make(tmp_path) for make in made), *targets.configs()]:
        for seed in target.seeds:
            target.parse(seed)
