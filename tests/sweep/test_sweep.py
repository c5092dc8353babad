"""A sweep on real files, in this process: rows, files, going on, failures."""

import json
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from sweep_cases import table, write_sweep

import fst_fast
from fst_fast import checkpoints
from fst_fast.checkpoints.atomic_files import TEMPORARIES
from fst_fast.cli.main import main
from fst_fast.data import image_sets
from fst_fast.lab.models import resnet8
from fst_fast.sweep import columns, grid, run
from fst_fast.sweep.grid import Cell, Choice, Done
from fst_fast.sweep.store import claimed


def row(checkpoint, method, alpha, seed, **more):
    """A row of the table, None where nothing else is said."""
    suspect = SimpleNamespace(path=checkpoint, sha256="00")
    return columns.row_of(Done(Cell("", suspect, Choice(method, alpha), seed))) | more


def sweep(config, *more):
    return main(["sweep", str(config), "--quiet", *more])


def refused(capsys, config, *texts):
    assert sweep(config) == 1
    message = capsys.readouterr().err
    for text in texts:
        assert text in message, message


def test_rows_are_what_purify_and_evaluate_say(tmp_path, capsys):
    config = write_sweep(tmp_path / "a", seeds=[0, 5], precision="fp32")
    assert sweep(config) == 0
    out = config.parent / "out"
    got = table(out)
    assert [(row["checkpoint"], row["method"], row["alpha"], row["seed"]) for row in got] == [
        (name, method, alpha, seed)
        for name in ("s0.pt", "s1.pt")
        for method, alpha in (("ft", ""), ("fst", "0.1"))
        for seed in ("0", "5")
    ]
    printed = capsys.readouterr().out
    assert "8 cells, 0 failed, 0 stopped early" in printed
    assert "not measured" in printed
    # The last row, by hand.
    folder = config.parent
    clean, test = (image_sets.npz(folder / f"{name}.npz") for name in ("clean", "test"))
    model = fst_fast.load(folder / "s1.pt", resnet8, 3, width=8)
    judged = fst_fast.DeviceLoader(test.images, test.labels, 8, shuffle=False)
    attack = (fst_fast.triggers.BadNets(size=2), 1)
    before = fst_fast.evaluate(model, judged, *attack, device="cpu", precision="fp32")
    result = fst_fast.purify(
        *(model, fst_fast.DeviceLoader(clean.images, clean.labels, 8, seed=5)),
        **{"alpha": 0.1, "epochs": 2, "seed": 5, "device": "cpu", "precision": "fp32"},
        **{"channels_last": True, "threads": 1, "progress": False, "check": False},
    )
    after = fst_fast.evaluate(result.model, judged, *attack, device="cpu", precision="fp32")
    last = got[-1]
    assert last["sha256"] == checkpoints.sha256(folder / "s1.pt")
    for name, value in {
        "clean_accuracy_before": before.clean_accuracy,
        "clean_accuracy_after": after.clean_accuracy,
        "attack_success_before": before.attack_success,
        "attack_success_after": after.attack_success,
        "robust_accuracy": after.robust_accuracy,
        "cosine": result.head_shift.cosine,
        "epochs": 2,
    }.items():
        assert float(last[name]) == value, name
    assert got[0]["attack_success_before"] == got[0]["robust_accuracy"] == "not measured"
    assert {*last} == {column.name for column in columns.COLUMNS} - {"seconds"}
    saved = checkpoints.read_state_dict(out / "cells" / "1-s1-fst-0.1-s5" / "purified.safetensors")
    for name, value in result.model.state_dict().items():
        assert torch.equal(saved[name], value), name
    manifest = json.loads((out / "cells" / "1-s1-fst-0.1-s5" / "purified.json").read_text())
    assert manifest["parent"]["sha256"] == last["sha256"]
    assert manifest["clean_accuracy"]["measured_on"] == "test images"
    assert manifest["attack_success"]["target"] == 1


def test_without_test_images_trigger_or_weights(tmp_path):
    config = write_sweep(tmp_path / "a", 1, test=None, weights=False, methods=["lp"], alphas=None)
    assert sweep(config) == 0
    (cell,) = (config.parent / "out" / "cells").iterdir()
    assert {path.name for path in cell.iterdir()} - {".lock"} == {"purified.json"}
    manifest = json.loads((cell / "purified.json").read_text())
    assert manifest["clean_accuracy"]["measured_on"] == "tuning images"
    assert manifest["attack_success"] == "not measured"


def test_finished_cells_are_not_done_again(tmp_path, monkeypatch):
    config = write_sweep(tmp_path / "a", 1)
    assert sweep(config) == 0
    first = (config.parent / "out" / "results.csv").read_bytes()
    monkeypatch.setattr(grid, "purify", None)
    monkeypatch.setattr(run, "evaluate", None)
    assert sweep(config) == 0
    assert (config.parent / "out" / "results.csv").read_bytes() == first


def test_settings_of_a_method_are_in_its_rows_and_hold_for_a_run_that_goes_on(
    tmp_path, monkeypatch, capsys
):
    entries = ["lp", {"name": "lp", "epochs": 3}, {"name": "d3", "fit": 2.0, "lr": 0.02}]
    chosen = {"alphas": None, "epochs": 2, "weights": False}
    config = write_sweep(tmp_path / "a", 1, methods=entries, **chosen)
    assert sweep(config) == 0
    out = config.parent / "out"
    rows = [(row["method"], row["settings"], row["epochs"]) for row in table(out)]
    assert rows == [
        ("lp", "", "2"),
        ("lp", '{"epochs": 3}', "3"),
        ("d3", '{"fit": 2.0, "lr": 0.02}', "2"),
    ]
    manifests = [json.loads(p.read_text()) for p in (out / "cells").glob("*d3*/purified.json")]
    assert [(m["settings"]["fit"], m["settings"]["lr"]) for m in manifests] == [(2.0, 0.02)]
    # One cell is lost, and done again under its own settings; the others are left alone.
    (lost,) = (out / "cells").glob("*d3*")
    (lost / "purified.json").unlink()
    done, purify = [], grid.purify
    monkeypatch.setattr(
        grid, "purify", lambda *a, **k: done.append(k["method"].name) or purify(*a, **k)
    )
    assert sweep(config) == 0
    assert done == ["d3"]
    assert [(row["method"], row["settings"], row["epochs"]) for row in table(out)] == rows
    other = [*entries[:2], {"name": "d3", "fit": 3.0, "lr": 0.02}]
    config = write_sweep(tmp_path / "a", 1, methods=other, **chosen)
    refused(capsys, config, "differs in settings.methods", "name another folder")


def test_a_folder_is_claimed_by_one_alone(tmp_path):
    with claimed(tmp_path, wait=False) as first:
        left = tmp_path / TEMPORARIES.replace("*", "00")
        left.write_text("half")
        with claimed(tmp_path, wait=False) as second:
            assert (first, second) == (True, False)
        assert left.exists()
    with claimed(tmp_path, wait=False) as again:
        assert again
        assert not left.exists()


def test_before_is_measured_once_per_checkpoint(tmp_path, monkeypatch):
    measured = []

    def counting(model, *more, **settings):
        measured.append(model)
        return fst_fast.evaluate(model, *more, **settings)

    monkeypatch.setattr(run, "evaluate", counting)
    assert sweep(write_sweep(tmp_path / "a", 2, seeds=[0, 1])) == 0
    assert len(measured) == 2 + 8


def test_networks_of_one_name_are_searched_once_for_their_head(tmp_path, monkeypatch):
    heads = []

    def watched(model, *more, head, **settings):
        heads.append(head)
        return fst_fast.purify(model, *more, head=head, **settings)

    monkeypatch.setattr(grid, "purify", watched)
    assert sweep(write_sweep(tmp_path / "a", 2, seeds=[0, 1])) == 0
    assert heads[0] is None
    assert set(heads[1:]) == {"head"}
    assert len(heads) == 8


def test_ctrl_c_ends_the_sweep_and_the_cell_goes_on(tmp_path, monkeypatch, capsys):
    config = write_sweep(tmp_path / "a", 1, methods=["ft"], alphas=None, epochs=3)
    real = fst_fast.purify
    seen = []

    def interrupted(*given, callbacks, **settings):
        def stop(record, model):
            seen.append(record.epoch)
            if seen == [1]:
                # What Ctrl-C does in the epoch that follows.
                signal.raise_signal(signal.SIGINT)

        return real(*given, callbacks=[*callbacks, stop], **settings)

    monkeypatch.setattr(grid, "purify", interrupted)
    assert sweep(config) == 1
    assert "the same command goes on" in capsys.readouterr().err
    assert sweep(config) == 0
    assert seen == [1, 2, 3]


def test_a_cell_that_fails_does_not_end_the_sweep(tmp_path, capsys):
    config = write_sweep(tmp_path / "a", 2)
    (config.parent / "s0.pt").write_bytes(b"no checkpoint")
    assert sweep(config) == 1
    printed = capsys.readouterr().out
    assert "4 cells, 2 failed" in printed
    got = table(config.parent / "out")
    assert ["LoadError" in row["error"] for row in got] == [True, True, False, False]
    assert got[0]["clean_accuracy_after"] == got[0]["attack_success_after"] == ""
    # They stay failed, until they are asked for again.
    assert sweep(config) == 1
    assert table(config.parent / "out") == got


def test_failed_cells_again(tmp_path, monkeypatch):
    config = write_sweep(tmp_path / "a", 1)

    def broken(*given, **settings):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(grid, "purify", broken)
        assert sweep(config) == 1
    assert {row["error"] for row in table(config.parent / "out")} == {"RuntimeError: out of memory"}
    assert sweep(config, "--retry-failed") == 0
    assert {row["error"] for row in table(config.parent / "out")} == {""}


def test_a_run_that_stops_early_is_told(tmp_path, capsys):
    config = write_sweep(tmp_path / "a", 1, methods=["ft"], alphas=None, lr=1e30)
    assert sweep(config) == 1
    (row,) = table(config.parent / "out")
    assert "not finite" in row["stopped"]
    assert row["error"] == ""
    assert "1 stopped early" in capsys.readouterr().out


def test_a_full_disk_is_no_cells_failure(tmp_path, monkeypatch, capsys):
    config = write_sweep(tmp_path / "a", 1)

    def full(*given, **settings):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(grid, "purify", full)
        refused(capsys, config, "No space left")
    assert sweep(config) == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": 3}, "settings.epochs (2 there, 3 here)"),
        ({"seeds": [0, 1]}, "settings.seeds ([0] there, [0, 1] here)"),
        ({"checkpoints": 2}, "checkpoints.1 s1.pt (absent there"),
        ({"test": None}, "test"),
        ({"data": "test.npz"}, "data.images (24 there, 18 here)"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(tmp_path, capsys, changes, named):
    assert sweep(write_sweep(tmp_path / "a", 1, methods=["lp"], alphas=None)) == 0
    capsys.readouterr()
    changed = {"methods": ["lp"], "alphas": None, "checkpoints": 1, **changes}
    refused(capsys, write_sweep(tmp_path / "a", **changed), "out must be a folder of its", named)


def test_another_file_under_the_same_name_is_refused(tmp_path, capsys):
    config = write_sweep(tmp_path / "a", 1, methods=["lp"], alphas=None)
    assert sweep(config) == 0
    torch.save(resnet8(3, 8).state_dict(), config.parent / "s0.pt")
    refused(capsys, config, "checkpoints.0 s0.pt.sha256")


def test_what_may_change(tmp_path):
    assert sweep(write_sweep(tmp_path / "a", 1, methods=["lp"], alphas=None)) == 0
    # A default spelled out, and another name of the same images.
    (tmp_path / "a" / "clean.npz").rename(tmp_path / "a" / "other.npz")
    config = write_sweep(
        tmp_path / "a", 1, methods=["lp"], alphas=None, lr=0.01, data="other.npz", seeds=[0]
    )
    assert sweep(config) == 0


def test_parquet_without_pyarrow_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    config = write_sweep(tmp_path / "a", 1, results="parquet")
    refused(capsys, config, "results must be csv", "pip install pyarrow")
    assert not (config.parent / "out").exists()


def test_parquet_holds_the_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    given = [
        row(
            "a.pt", "fst", "auto", 0, epochs=40, clean_accuracy_before=0.5, cosine=-0.5, seconds=1.0
        ),
        row("a.pt", "ft", None, 1, error="LoadError: no"),
    ]
    read = parquet.read_table(columns.write_rows(tmp_path, given, "parquet")).to_pylist()
    assert read == given


def test_csv_keeps_every_digit(tmp_path):
    measured = {"clean_accuracy_before": 0.1 + 0.2, "clean_accuracy_after": 1 / 3, "cosine": -2 / 3}
    columns.write_rows(tmp_path, [row("a,b.pt", "fst", 0.1, 0, seconds=1.0, **measured)], "csv")
    (read,) = table(tmp_path)
    assert read["checkpoint"] == "a,b.pt"
    for name, value in measured.items():
        assert float(read[name]) == value


def test_a_column_is_one_entry(tmp_path, monkeypatch, capsys):
    """In the file, in the manifest and on the terminal."""
    more = columns.Column("norm", float, "result.head_shift.norm")
    shown = columns.Column("tested", int, "after.images", "tested")
    monkeypatch.setattr(columns, "COLUMNS", (*columns.COLUMNS, more, shown))
    config = write_sweep(tmp_path / "a", 1, methods=["lp"], alphas=None)
    assert sweep(config) == 0
    (got,) = table(config.parent / "out")
    assert float(got["norm"]) > 0
    assert got["tested"] == "18"
    assert "tested" in capsys.readouterr().out


def test_a_sweep_goes_on_when_the_columns_are_others(tmp_path, monkeypatch, capsys):
    """What a finished cell does not hold is empty; what is no column any more is left out."""
    config = write_sweep(tmp_path / "a", 1, methods=["lp"], alphas=None)
    assert sweep(config) == 0
    (before,) = table(config.parent / "out")
    kept = [column for column in columns.COLUMNS if column.name != "cosine"]
    norm = columns.Column("norm", float, "result.head_shift.norm", "norm")
    monkeypatch.setattr(columns, "COLUMNS", (*kept, norm))
    capsys.readouterr()
    assert sweep(config) == 0
    (after,) = table(config.parent / "out")
    del before["cosine"]
    assert after == before | {"norm": ""}
    assert "norm" in capsys.readouterr().out
