"""``fst-fast lab table``: every cell once, whatever interrupts it, and what the tables say."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from sweep_cases import write_parts

from fst_fast.cli.main import build_parser, main
from fst_fast.sweep import grid, table, tables
from fst_fast.sweep.grid import Cell, Choice
from fst_fast.sweep.presets import PRESETS
from fst_fast.sweep.store import Record

METHODS = ["none", "fst:0.1", "fst_auto"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("data"), 60, 24)


def arguments(data, folder, *more):
    size = ["--arch", "resnet8:4", "--train-epochs", "1", "--epochs", "1", "--clean-images", "24"]
    attacks = ["--attacks", "badnets", "--rates", "0.2", "--methods", *METHODS, "--seeds", "2"]
    where = ["--models", str(folder / "models"), "--out", str(folder / "records")]
    run = ["--name", "tiny", "--device", "cpu", "--threads", "1", "--batch-size", "16"]
    return ["lab", "table", "--data", str(data), *size, *attacks, *where, *run, *more]


def record_of(folder):
    (path,) = (folder / "records" / "cpu").glob("*-efficacy-tiny.json")
    return json.loads(path.read_text())


def rows_of(folder, timed=False):
    """All rows by suspect; without the seconds, in which two runs may differ."""
    left_out = () if timed else ("seconds", "commit")
    return {
        title: [{k: v for k, v in row.items() if k not in left_out} for row in made["rows"]]
        for title, made in record_of(folder)["suspects"].items()
    }


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(arguments(data, folder)) == 0
    return folder


def test_every_cell_is_measured(whole):
    record = record_of(whole)
    assert list(record["suspects"]) == ["badnets 20%", "clean"]
    cells = [("none", None), *((m, s) for m in ("fst", "fst_auto") for s in (0, 1))]
    for title, made in record["suspects"].items():
        control = [] if title == "clean" else [("never backdoored", None)]
        assert [(row["method"], row.get("seed")) for row in made["rows"]] == cells + control
        for row in made["rows"][1:5]:
            assert row["seconds"] > 0
            assert ("retuned" in row) == (title != "clean")
            assert (row["der"] is None) == (title == "clean")
    badnets = record["suspects"]["badnets 20%"]
    assert badnets["poisoned_images"] == 12
    assert badnets["trigger"]["name"] == "BadNets"
    assert not badnets["developed"]
    assert [row["alpha"] for row in badnets["rows"] if "alpha" in row] == [0.1, 0.1]
    assert {row["epochs"] for row in badnets["rows"] if row["method"] == "fst_auto"} == {4}
    # The control is the clean model under the suspect's attacks.
    control, clean = badnets["rows"][-1], record["suspects"]["clean"]["rows"][0]
    assert control["clean_accuracy"] == clean["clean_accuracy"]
    assert 0 <= control["attack_success"] <= 1
    assert 0 <= control["retuned"]["attack_success"] <= 1


def test_more_seeds_are_added_to_a_table(data, whole, tmp_path):
    assert main(arguments(data, tmp_path, "--seeds", "1")) == 0
    first = rows_of(tmp_path, timed=True)
    assert main(arguments(data, tmp_path, "--seeds", "2")) == 0
    for title, rows in rows_of(tmp_path, timed=True).items():
        assert rows[: len(first[title])] == first[title]
    assert record_of(tmp_path)["settings"] == record_of(whole)["settings"]
    for title, rows in rows_of(tmp_path).items():
        assert sorted(rows, key=str) == sorted(rows_of(whole)[title], key=str)
    # Fewer take nothing away.
    done = record_of(tmp_path)
    assert main(arguments(data, tmp_path, "--seeds", "1")) == 0
    assert record_of(tmp_path) == done


def test_the_control_is_done_once_for_all_rates(data, tmp_path, monkeypatch):
    real, calls = table.woken, []

    def woken(*given):
        calls.append(given)
        return real(*given)

    monkeypatch.setattr(table, "woken", woken)
    assert main(arguments(data, tmp_path, "--rates", "0.2", "0.4", "--methods", "none")) == 0
    rows = rows_of(tmp_path)
    assert rows["badnets 20%"][1]["method"] == "never backdoored"
    assert rows["badnets 20%"][1] == rows["badnets 40%"][1]
    assert len(calls) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_table_goes_on_and_ends_the_same(data, whole, tmp_path):
    command = [sys.executable, "-m", "fst_fast", *arguments(data, tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = tmp_path / "records" / "cpu"
    while child.poll() is None and not (
        list(records.glob("*.json")) and len(rows_of(tmp_path).get("badnets 20%", ())) >= 3
    ):
        time.sleep(0.005)
    assert child.poll() is None
    child.kill()
    child.communicate()
    done = rows_of(tmp_path, timed=True)["badnets 20%"]
    assert 3 <= len(done) <= 5
    suspect = next((tmp_path / "models").glob("badnets-*.safetensors"))
    made = suspect.stat().st_mtime_ns
    # As on another day.
    (path,) = records.glob("*.json")
    path.rename(path.with_name("2020-01-01-efficacy-tiny.json"))
    assert main(arguments(data, tmp_path)) == 0
    assert rows_of(tmp_path) == rows_of(whole)
    assert rows_of(tmp_path, timed=True)["badnets 20%"][: len(done)] == done
    assert suspect.stat().st_mtime_ns == made


def test_ctrl_c_is_no_error_and_a_finished_table_is_left_alone(
    data, whole, tmp_path, monkeypatch, capsys
):
    real, calls = grid.purify, []

    def interrupted(*given, **more):
        calls.append(more["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **more)

    few = arguments(data, tmp_path, "--methods", "ft", "--seeds", "1", "--qra")
    monkeypatch.setattr(grid, "purify", interrupted)
    assert main(few) == 1
    assert "lab table: stopped; the same command goes on" in capsys.readouterr().err
    done = {title: [row["method"] for row in rows] for title, rows in rows_of(tmp_path).items()}
    assert done == {"clean": ["none", "ft"], "badnets 20%": ["none"]}
    assert main(few) == 0
    assert len(calls) == 3
    assert [row["method"] for row in rows_of(tmp_path)["badnets 20%"]][2:] == ["never backdoored"]
    queried = rows_of(tmp_path)["badnets 20%"][1]["reactivated"]
    assert 0 <= queried["success"] <= 1
    capsys.readouterr()
    assert main(few) == 0
    assert len(calls) == 3
    printed = capsys.readouterr()
    assert "lab table: goes on; 5 of 5 cells are done" in printed.err
    assert "`tiny`: resnet8:4, 60 training, 24 test and 24 clean images, 1 seed;" in printed.out


def test_a_row_is_that_of_its_method_alpha_and_seed(tmp_path):
    record = Record(tmp_path / "record.json", {"suspects": {}})
    done = Cell("a", None, Choice("fst", 0.2), 1)
    record.begin("a", {"attack": "badnets", "versions": {}})
    record.add(done, {**done.facts, "seconds": 3.0})
    record.begin("a", {"attack": "another"})
    assert record.finished(done)["seconds"] == 3.0
    for other in (
        {"choice": Choice("ft", 0.2)},
        {"choice": Choice("fst", 0.1)},
        {"choice": Choice("fst", 0.2, (("project", False),))},
        {"seed": 0},
        {"title": "b"},
    ):
        assert record.finished(replace(done, **other)) is None
    written = json.loads(record.path.read_text())["suspects"]["a"]
    assert written == {"attack": "badnets", "rows": [record.finished(done)]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "2"], "differs in epochs (1 there, 2 here)"),
        (["--attacks", "badnet"], "did you mean badnets"),
        (["--methods", "fst:x"], "methods must be like none, ft, ft_init"),
        (["--methods", "ft:0.1"], "method 'ft' does not take alpha"),
        (["--methods", "nothing"], "methods must be like"),
        (["--methods", "d3,lam=2"], "d3 has no setting lam; its own are fit, project, slack"),
        (["--methods", "d3,fit"], "a setting must be like name=value, got 'fit'"),
        (["--arch", "torchvision/resnet1"], "near matches: resnet1"),
        (["--attacks", "sig", "--rates", "0.5"], "lab: sig: rate 0.5 asks for 30 images"),
        (["--seeds", "0"], "--seeds must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_done_is_told_before_any_training(
    data, whole, capsys, monkeypatch, more, message
):
    monkeypatch.setattr(grid, "purify", None)
    before = rows_of(whole, timed=True)
    assert main(arguments(data, whole, *more)) == 1
    assert message in capsys.readouterr().err
    assert rows_of(whole, timed=True) == before


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("badnets-*.safetensors", b"{", "restore both from a copy"),
        ("badnets-*.json", b'{"format_version": 3, "payload": "x"', "is not readable"),
        ("pattern-*.json", b"{", "got a damaged file; delete it"),
        ("pattern-*.json", b"{}", "pattern must be a shape and pixels as pack_pattern writes them"),
    ],
)
def test_damaged_files_of_the_folder_are_named(data, tmp_path, capsys, kind, content, message):
    attacks = ["--attacks", "siba", "badnets", "--methods", "none", "--search", "1"]
    assert main(arguments(data, tmp_path, *attacks)) == 0
    (damaged,) = (tmp_path / "models").glob(kind)
    damaged.write_bytes(content)
    for made in (tmp_path / "models").glob("siba-*"):
        made.unlink()
    (record,) = (tmp_path / "records" / "cpu").glob("*.json")
    record.unlink()
    capsys.readouterr()
    assert main(arguments(data, tmp_path, *attacks)) == 1
    told = capsys.readouterr().err
    assert message in told
    assert damaged.stem in told


def test_data_without_test_images_is_refused(data, tmp_path, capsys):
    assert main(arguments(data / "train.npz", tmp_path)) == 1
    assert "--data must hold train and test images" in capsys.readouterr().err


def test_the_full_preset_has_what_the_evidence_needs():
    full = PRESETS["full"]
    assert {"badnets", "blended", "sig", "wanet", "batt-rotation", "siba"} <= set(full.attacks)
    assert {0.05, 0.01, 0.005} <= set(full.rates)
    assert (full.arch, full.seeds) == ("resnet18:16", 3)
    assert build_parser().parse_args(["lab", "table", "--preset", "full"]).methods == (
        *("none", "ft", "ft_init", "fe", "lp", "fst:0.2", "fst_auto", "fst:auto"),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fst", Choice("trigger_unlearning")),
        ("fst:auto", Choice("trigger_unlearning")),
        ("fst_auto", Choice("fst_auto")),
        ("fst:0.2", Choice("fst", 0.2)),
        ("lp", Choice("lp")),
        ("none", Choice("none")),
        ("d3,fit=2.0,epochs=40", Choice("d3", None, (("epochs", 40), ("fit", 2.0)))),
        ("fst:0.2,project=false", Choice("fst", 0.2, (("project", False),))),
        ("ssft,trigger=badnets", Choice("ssft", None, (("trigger", "badnets"),))),
    ],
)
def test_methods_by_name(text, expected):
    assert Choice.of(text) == expected


def row(method, clean, success, **more):
    measured = {"clean_accuracy": clean, "attack_success": success, "robust_accuracy": 0.5}
    return {"method": method, **measured, **more}


def tuned(clean, success, seed, woken, **more):
    attacked = {"retuned": row("", 0.0, woken), **more}
    return row("ft", clean, success, seed=seed, der=0.7, seconds=2.0 + seed, **attacked)


def test_a_row_is_named_by_its_settings(tmp_path):
    record = Record(tmp_path / "record.json", {"suspects": {}})
    record.begin("a", {})
    for text in ("d3", "d3,fit=2.0,epochs=4", "fst:0.2,project=false", "ssft,trigger=sig"):
        cell = Cell("a", None, Choice.of(text), 0)
        record.add(cell, cell.facts)
        assert record.finished(cell)["method"] == cell.choice.name
    assert tables.names(record.content) == [
        *("d3", "d3, epochs 4, fit 2.0", "fst, alpha 0.2, project False", "ssft, trigger sig"),
    ]


def test_tables_are_means_over_the_seeds_and_over_attacks_that_succeeded():
    shown = {
        "a": {
            "trigger": {},
            "developed": False,
            "rows": [
                row("none", 0.9, 1.0),
                tuned(0.8, 0.2, 0, 0.5, reactivated={"success": 0.1}),
                tuned(0.7, 0.4, 1, 0.7, reactivated={"success": 0.2}),
            ],
        },
        "b": {
            "trigger": {},
            "developed": True,
            "rows": [row("none", 0.9, 1.0), tuned(0.1, 0.9, 0, 0.9)],
        },
        "c": {
            "trigger": {},
            "developed": False,
            "rows": [row("none", 0.9, 0.7), tuned(0.1, 0.9, 0, 0.9)],
        },
        "unfinished": {"trigger": {}, "developed": False, "rows": [row("none", 0.9, 0.9)]},
        "clean": {
            "trigger": None,
            "developed": False,
            "rows": [row("none", 0.95, None), row("ft", 0.93, None, seed=0)],
        },
    }
    images = {"train": {"images": 60}, "test": {"images": 24}, "clean_images": 12}
    settings = {"suspects": {"a": {"arch": "resnet8:4"}}, "seeds": 2, **images}
    device = {"name": "slow", "type": "cpu"}
    made = {"name": "n", "date": "2020-01-01", "commit": None, "dirty": False, "device": device}
    record = {**made, "settings": settings, "suspects": shown}
    assert tables.about(record) == (
        "`n`: resnet8:4, 60 training, 24 test and 12 clean images, 1 to 2 seeds; slow, 2020-01-01, "
        "no commit"
    )
    went_on = {**shown["clean"], "rows": [row("none", 0.95, None, commit="b" * 40)]}
    continued = {**record, "commit": "a" * 40, "suspects": {"clean": went_on}}
    assert tables.about(continued).endswith("2020-01-01, aaaaaaa, bbbbbbb")
    assert tables.by_suspect(record) == (
        ["suspect", "none", "ft"],
        [
            ["a", "90.0 / 100.0", "75.0 / 30.0 (60.0, 15.0)"],
            ["b *", "90.0 / 100.0", "10.0 / 90.0 (90.0)"],
            ["c", "90.0 / 70.0", "10.0 / 90.0 (90.0)"],
            ["unfinished", "90.0 / 90.0", ""],
            ["clean", "95.0", "93.0"],
        ],
    )
    header, rows = tables.by_method(record)
    assert rows == [
        ["none", "90.0", "100.0", "100.0", "50.0", "", "", "", "", "95.0"],
        ["ft", "75.0", "30.0", "40.0", "50.0", "0.700", "60.0", "15.0", "2.5", "93.0"],
    ]
    assert len(header) == len(rows[0])
