"""files: a pair is replaced or left, whatever fails; a changed byte is found on loading."""

import json
import math
import os

import pytest
import safetensors.torch
import torch
from checkpoint_cases import Net, names, refused

from fst_fast.checkpoints.load import LoadError, load, read_state_dict, save


@pytest.mark.parametrize("old", [True, False], ids=["over old", "new"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize(
    ("call", "nth"),
    [(c, n) for c, last in (("fsync", 6), ("replace", 2), ("open", 6)) for n in range(1, last + 1)]
    + [("replace", 0)],
)
def test_a_failed_save_leaves_the_old_pair(tmp_path, monkeypatch, old, error, links, call, nth):
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

    def no_link(*args, **kwargs):
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        if not links:
            patch.setattr(os, "link", no_link)
        with pytest.raises((OSError, KeyboardInterrupt)):
            save(path, Net(), {"seed": 2})
    assert count[0] >= max(nth, 1), "the fault was never reached"
    assert before == {n: (tmp_path / n).read_bytes() for n in names(tmp_path)}
    if old:
        load(path, Net, 3)


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
    """After a kill nothing is put back: every state on the way must load."""
    path = tmp_path / "m.safetensors"
    save(path, Net(), {"seed": 1})
    states = []

    def look(real):
        def wrapped(*args, **kwargs):
            states.append((load(path, Net, 3), path.with_suffix(".json").exists()))
            return real(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for call in ("replace", "link", "fsync"):
            patch.setattr(os, call, look(getattr(os, call)))
        save(path, Net(), {"seed": 2})
    assert len(states) >= 8
    assert {with_manifest for _, with_manifest in states} == {True, False}


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_every_flipped_byte_is_found(tmp_path, suffix):
    path = tmp_path / "m.safetensors"
    save(path, {"w": torch.arange(8.0)}, {"note": "é", "rate": 0.1, "versions": {}})
    flipped = path.with_suffix(suffix)
    whole = flipped.read_bytes()
    for at in range(len(whole)):
        flipped.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(LoadError, match=r"bytes that m\.json recorded"):
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
    for changed in ({"seed": 3}, {"rate": math.nan}, {"format_version": 3}, {"format": "other"}):
        beside.write_text(json.dumps(fields | changed))
        refused(path, "a manifest that", "remove m.json")
    beside.write_text(json.dumps(fields))
    refused(path, "changed after it was written")
    beside.unlink()
    load(path, Net, 3)


def test_a_manifest_of_the_first_version_has_no_digest_of_its_own(tmp_path):
    path = tmp_path / "m.safetensors"
    fields = save(path, Net(), {})
    del fields["manifest_sha256"]
    beside = path.with_suffix(".json")
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
