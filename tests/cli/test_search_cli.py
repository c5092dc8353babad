"""``fst-fast search``: a table, JSON, a file of triggers and pictures of them."""

import json

import border_cases
import pytest
import torch

import fst_fast
from fst_fast.cli.main import main

NAMES = {name: number for number, name in enumerate(("ant", "bee", "cat", "dog"))}


@pytest.fixture
def files(tmp_path):
    torch.save(border_cases.nearest(4).state_dict(), tmp_path / "suspect.pt")
    border_cases.write_folders(tmp_path / "clean", NAMES)
    return tmp_path


def run(root, *more):
    arguments = ["search", str(root / "suspect.pt"), "--arch", border_cases.ARCH]
    arguments += ["--normalize", "none", "--data", str(root / "clean"), "--device", "cpu"]
    return main([*arguments, "--precision", "fp32", "--quiet", *map(str, more)])


def test_a_table_a_file_and_pictures(files, capsys):
    out = files / "new" / "found"
    before = (files / "suspect.pt").read_bytes()
    assert run(files, "--forms", "mask", "additive", "--out", out) == 0
    told = capsys.readouterr().out
    assert "no proof that there are none" in told
    assert "0 ant" in told
    assert "at half size" in told
    assert (files / "suspect.pt").read_bytes() == before
    result = fst_fast.SearchResult.load(out / "candidates.safetensors")
    assert str(result) in told
    assert {candidate.form for candidate in result.candidates} == {"mask", "additive"}
    assert len(list(out.glob("*.png"))) == len(result.candidates) == 8
    manifest = json.loads((out / "candidates.json").read_text())
    assert manifest["parent"]["sha256"] == fst_fast.checkpoints.sha256(files / "suspect.pt")
    assert manifest["data"]["classes"] == list(NAMES)


def test_json_for_machines(files, capsys):
    more = ["--forms", "mask", "--targets", 1, 3, "--steps", 66, "--seed", 4]
    assert run(files, "--json", *more) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["target"] for row in found["candidates"]} == {1, 3}
    assert {row["form"] for row in found["candidates"]} == {"mask"}
    assert found["settings"]["steps"] == 66
    assert len(found["evidence"]) == 4
    assert sum(found["evidence"]) == pytest.approx(1)
    assert isinstance(found["verdict"], str)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--steps", 3], "steps must be an integer >= 64, got 3"),
        (["--targets", 4], "classes must be an integer in 0..3, got 4"),
    ],
)
def test_bad_input_is_told_in_one_line(files, capsys, more, text):
    assert run(files, *more) == 1
    told = capsys.readouterr().err
    assert text in told
    assert "Traceback" not in told
