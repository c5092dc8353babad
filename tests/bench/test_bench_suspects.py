"""benchmarks/suspects.py: every method on each suspect of a folder, resumed row by row."""

import io
import json
import sys

import efficacy_tables
import numpy as np
import pytest
import record_files
import suspects as bench
import tuned_suspects
from PIL import Image

import fst_fast

SUSPECTS = """
import torch
from torch import nn

SUSPECTS = {"white": None, "clean": None}


def corner(images):
    out = images.copy()
    out[:, -2:, -2:] = 255
    return out


def load(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 12))
        model[2].bias.copy_(torch.tensor([6.0, -6.0]))
    unit = ((0.0,) * 3, (1.0,) * 3)
    return (model, unit, corner, 1) if name == "white" else (model, unit, None, None)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "suspects.py").write_text(SUSPECTS)
    # The suspects take the bright ones for class 1.
    images = np.random.default_rng(1).integers(0, 100, (40, 8, 8, 3), dtype=np.uint8)
    images[1::2] += 155
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file, "png")
    encoded = [file.getvalue() for file in files]
    for split in ("train", "test"):
        np.savez(
            tmp_path / f"{split}.npz",
            encoded=np.frombuffer(b"".join(encoded), np.uint8),
            offsets=np.cumsum([0, *map(len, encoded)]),
            labels=np.arange(40) % 2,
            classes=np.array(["a", "b"]),
        )
    return tmp_path


def run(folder, monkeypatch, *methods):
    arguments = ["suspects.py", str(folder), "--data", str(folder), "--methods", *methods]
    arguments += ["--clean-images", "20", "--record", str(folder / "record.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    return json.loads((folder / "record.json").read_text())


def test_rows_are_measured_kept_and_tabulated(folder, monkeypatch):
    record = run(folder, monkeypatch, "ft:1")
    assert [(row["suspect"], row["method"]) for row in record["rows"]] == [
        ("white", "none"),
        ("white", "ft:1"),
        ("clean", "none"),
        ("clean", "ft:1"),
    ]
    assert record["rows"][0]["attack_success"] is not None
    assert record["rows"][2]["attack_success"] is None
    # The white corner lifts some dark images over the bound between the classes.
    assert record["rows"][0]["clean_as_target"] <= record["rows"][0]["attack_success"]
    assert record["rows"][1]["epochs"] == 1
    assert record["rows"][1]["seconds"] > 0
    again = run(folder, monkeypatch, "ft:1", "fst:0.1")
    assert again["rows"][: len(record["rows"])] == record["rows"], "nothing is made twice"
    assert {row["method"] for row in again["rows"]} == {"none", "ft:1", "fst:0.1"}
    (folder / "cpu").mkdir()
    (folder / "record.json").rename(folder / "cpu" / "2026-01-01-suspects.json")
    monkeypatch.setattr(record_files, "RESULTS", folder)
    text = efficacy_tables.suspects()
    assert "| suspect | none | ft:1 | fst:0.1 |" in text
    clean = record["rows"][3]["clean_accuracy"]
    assert f"| {100 * clean:.1f} |" in text


def test_a_busy_machine_is_no_clock(folder, monkeypatch):
    record = run(folder, monkeypatch, "ft:1", "--untimed")
    assert all("seconds" not in row for row in record["rows"])
    monkeypatch.setattr(record_files, "RESULTS", folder)
    assert record_files.default_seconds() == {}


def test_rows_of_other_methods_are_taken_over(folder, monkeypatch):
    old = run(folder, monkeypatch, "ft:1", "fst:0.1")
    older = folder / "older.json"
    (folder / "record.json").rename(older)
    record = run(folder, monkeypatch, "ft:1", "--others", str(older))
    taken = [row for row in record["rows"] if "commit" in row]
    assert {row["method"] for row in taken} == {"fst:0.1"}
    assert {row["commit"] for row in taken} == {old["commit"]}
    assert len(record["rows"]) == len(taken) + 4, "the others are measured anew"
    (folder / "cpu").mkdir()
    (folder / "record.json").rename(folder / "cpu" / "2026-01-01-suspects.json")
    monkeypatch.setattr(record_files, "RESULTS", folder)
    assert f"fst:0.1 at {old['commit'][:7]}:" in efficacy_tables.suspects()


def test_a_method_that_refuses_a_model_is_a_row(folder, monkeypatch):
    """The suspects have no batch norm."""
    record = run(folder, monkeypatch, "clp", "ft:1")
    refused = [row for row in record["rows"] if "refused" in row]
    assert {row["method"] for row in refused} == {"clp"}
    assert "batch norm" in refused[0]["refused"]
    assert record["rows"][-1]["method"] == "ft:1", "what follows is run"
    (folder / "cpu").mkdir()
    (folder / "record.json").rename(folder / "cpu" / "2026-01-01-suspects.json")
    monkeypatch.setattr(record_files, "RESULTS", folder)
    assert "| refused |" in efficacy_tables.suspects()
    assert "clp" not in record_files.published_suspects()["white"]


def test_some_rows_of_a_method_may_be_of_another_commit():
    rows = [
        {"suspect": "white", "method": "auto"},
        {"suspect": "clean", "method": "auto", "commit": "1234567890"},
        {"suspect": "white", "method": "ft:1", "commit": "abcdefghij"},
    ]
    told = efficacy_tables.made_elsewhere(rows)
    assert told == ["auto of clean at 1234567", "ft:1 at abcdefg"]


def test_rows_of_another_protocol_are_not_taken_over(folder, monkeypatch):
    older = {"protocol": {}, "rows": []}
    (folder / "older.json").write_text(json.dumps(older))
    with pytest.raises(SystemExit, match="must be of the protocol"):
        run(folder, monkeypatch, "ft:1", "--others", str(folder / "older.json"))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("auto", {"method": "fst", "alpha": "auto", "epochs": 10}),
        ("fst:0.2", {"method": "fst", "alpha": 0.2, "epochs": 10}),
        ("ft:40", {"method": "ft", "alpha": None, "epochs": 40}),
        ("fst_auto", {"method": "fst_auto", "alpha": None, "epochs": 10}),
    ],
)
def test_methods_by_name(written, expected):
    assert bench.settings_of(written) == expected


def tuned(folder, monkeypatch, *attacks):
    arguments = ["tuned_suspects.py", str(folder / "tuned"), "--folder", str(folder), "--clean"]
    arguments += ["clean", "--data", str(folder), "--attacks", *attacks, "--clean-images", "10"]
    arguments += ["--epochs", "1", "--images", "24"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(tuned_suspects, "BATCH", 4)
    tuned_suspects.main()
    return json.loads((folder / "tuned" / "suspects.json").read_text())


def test_suspects_made_of_a_clean_one_are_a_folder_of_suspects(folder, monkeypatch):
    first = tuned(folder, monkeypatch, "badnets:0.25")
    facts = tuned(folder, monkeypatch, "badnets:0.25", "blended:0.25")
    assert list(facts) == ["clean_badnets_25", "clean_blended_25"]
    assert facts["clean_badnets_25"] == first["clean_badnets_25"], "nothing is made twice"
    module = bench.suspects_of(folder / "tuned")
    assert set(module.SUSPECTS) == set(facts)
    model, normalize, trigger, target = module.load("clean_badnets_25")
    assert repr(trigger) == repr(fst_fast.triggers.BadNets(margin=2))
    assert target == 0
    clean = bench.suspects_of(folder).load("clean")[0]
    assert not model[2].weight.equal(clean[2].weight), "it was tuned"
    test = tuned_suspects.npz(folder / "test.npz")
    again = bench.measured(model, test, normalize, trigger, target)
    assert again == {name: facts["clean_badnets_25"][name] for name in again}


def test_an_attack_that_needs_a_surrogate_is_refused(folder, monkeypatch):
    with pytest.raises(SystemExit, match="siba needs a surrogate"):
        tuned(folder, monkeypatch, "siba:0.25")
