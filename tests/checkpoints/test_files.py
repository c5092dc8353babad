"""files: each is replaced or left, whatever fails; a changed byte is found on loading."""

import hashlib
import json
import math
import os
import warnings

import pytest
import safetensors.torch
import torch
from checkpoint_cases import Net, names, refused

from fst_fast.checkpoints import LoadError, load, manifest, read_state_dict, save
from fst_fast.checkpoints.atomic_files import dump_json


@pytest.mark.parametrize("old", [True, False], ids=["over old", "new"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(
    ("call", "nth"),
    [(c, n) for c, last in (("fsync", 4), ("replace", 2), ("open", 4)) for n in range(1, last + 1)]
    + [("replace", 0)],
)
def test_a_failed_save_leaves_whole_files(tmp_path, monkeypatch, old, error, call, nth):
    """The nth call (0: every one) of os.fsync, os.replace or os.open fails."""
    path = tmp_path / "m.safetensors"
    if old:
        save(path, Net(), {"seed": 1})
    before = {n: (tmp_path / n).read_bytes() for n in names(tmp_path)}
    real, count = getattr(os, call), [0]

    def fail(*args, **kwargs):
        count[0] += 1
        if nth in (0, count[0]):
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises((OSError, KeyboardInterrupt)):
            save(path, Net(), {"seed": 2})
    assert count[0] >= max(nth, 1), "the fault was never reached"
    after = {n: (tmp_path / n).read_bytes() for n in names(tmp_path)}
    # The payload goes first: without it, nothing has changed.
    if after.get(path.name) == before.get(path.name):
        assert after == before
        return
    assert set(after) <= {"m.safetensors", "m.json"}
    load_quietly(path)
    found = manifest.check(path)
    assert (found.facts["seed"], found.fault) == (2, None)
    # The copy is of the new payload, or as it was: that is said.
    assert (found.note is None) == (after.get("m.json") != before.get("m.json") or not old)


def load_quietly(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(path, Net, 3)


def test_a_failed_serialisation_leaves_the_old_pair(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save(path, Net(), {})
    before = {n: (tmp_path / n).read_bytes() for n in names(tmp_path)}

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(safetensors.torch, "save", fail)
    with pytest.raises(MemoryError):
        save(path, Net(), {})
    assert before == {n: (tmp_path / n).read_bytes() for n in names(tmp_path)}


def test_killed_at_any_call_the_payload_still_loads(tmp_path, monkeypatch):
    """After a kill nothing is put back: every state on the way must load, with its own facts."""
    path = tmp_path / "m.safetensors"
    save(path, Net(), {"seed": 1})
    states = []

    def look(real):
        def wrapped(*args, **kwargs):
            load_quietly(path)
            states.append(manifest.check(path))
            return real(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for call in ("replace", "fsync"):
            patch.setattr(os, call, look(getattr(os, call)))
        save(path, Net(), {"seed": 2})
    assert len(states) >= 6
    assert [found.fault for found in states] == [None] * len(states)
    # The old one; the new one beside a copy of the old one's; the new one.
    said = [(found.facts["seed"], found.note is None) for found in [*states, manifest.check(path)]]
    assert list(dict.fromkeys(said)) == [(1, True), (2, False), (2, True)]


def test_a_copy_that_differs_is_said(tmp_path):
    path, other = tmp_path / "m.safetensors", tmp_path / "o.safetensors"
    save(path, Net(), {"seed": 1})
    save(other, Net(), {"seed": 2, "more": [1]})
    os.replace(other.with_suffix(".json"), path.with_suffix(".json"))
    with pytest.warns(UserWarning, match=r"m\.json is another model's \(seed\); the file's own"):
        load(path, Net, 3)
    assert manifest.check(path).facts["seed"] == 1
    # Without the copy nothing is lacking.
    path.with_suffix(".json").unlink()
    assert manifest.check(path) == (manifest.header_facts(path), None, None)


def test_what_a_clock_says_is_in_the_copy_alone(tmp_path):
    path = tmp_path / "m.safetensors"
    bytes_of = []
    for seconds in (1.5, 2.5):
        history = [{"loss": 1.0, "seconds": seconds}]
        save(path, {"w": torch.ones(3)}, {"history": history, "seconds": seconds})
        bytes_of.append(path.read_bytes())
        assert manifest.check(path).facts["seconds"] == seconds
        assert manifest.check(path).note is None
    assert bytes_of[0] == bytes_of[1]


def test_a_fact_too_long_for_a_header_is_in_the_copy(tmp_path):
    path = tmp_path / "m.safetensors"
    history = ["x" * 1000] * 1000
    save(path, Net(), {"seed": 1, "history": history})
    load(path, Net, 3)
    assert path.stat().st_size < 100_000
    assert manifest.check(path).facts["history"] == history
    path.with_suffix(".json").unlink()
    assert set(manifest.check(path).facts) == {"seed", "versions", "format", "format_version"}


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_every_flipped_byte_is_found(tmp_path, suffix):
    path = tmp_path / "m.safetensors"
    save(path, {"w": torch.arange(8.0)}, {"note": "é", "rate": 0.1, "versions": {}})
    flipped = path.with_suffix(suffix)
    whole = flipped.read_bytes()
    for at in range(len(whole)):
        flipped.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(LoadError, match=r"bytes that it or m\.json recorded"):
            read_state_dict(path)
    flipped.write_bytes(whole)
    read_state_dict(path)


def test_a_damaged_manifest_is_found(tmp_path):
    path = tmp_path / "m.safetensors"
    save(path, Net(), {})
    beside = path.with_suffix(".json")
    whole = beside.read_bytes()
    beside.write_bytes(whole[:-9])
    refused(path, "not readable", "remove m.json")
    fields = json.loads(whole)
    for changed in ({"seed": 3}, {"rate": math.nan}, {"format_version": 4}, {"format": "other"}):
        beside.write_text(json.dumps(fields | changed))
        refused(path, "a manifest that", "remove m.json")
    beside.write_text(json.dumps(fields))
    refused(path, "changed after it was written")
    beside.unlink()
    load(path, Net, 3)


def test_manifests_of_older_versions_are_in_the_json_alone(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(Net().state_dict(), path)
    data, beside = path.read_bytes(), path.with_suffix(".json")
    facts = {"format": manifest.FORMAT, "format_version": 2, "payload": path.name, "seed": 1}
    fields = facts | {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    sealed = fields | {"manifest_sha256": hashlib.sha256(dump_json(fields)).hexdigest()}
    beside.write_bytes(dump_json(sealed))
    load(path, Net, 3)
    assert manifest.check(path) == (sealed, None, None)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(path, "m.json", "SHA-256")
    path.write_bytes(data)
    # Version 1 had no digest of its own.
    beside.write_text(json.dumps(fields | {"format_version": 1}))
    load(path, Net, 3)
    beside.write_text(json.dumps(fields | {"format_version": 1, "sha256": "0"}))
    refused(path, "recorded '0'")


@pytest.mark.parametrize(
    "text", ['{"sha256": "x"}', "[1]", "not JSON", "[" * 100_000, '{"payload": 3}']
)
def test_other_peoples_json_is_ignored(tmp_path, text):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(Net().state_dict(), path)
    path.with_suffix(".json").write_text(text)
    load(path, Net, 3)
