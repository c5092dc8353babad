"""fst-fast compare and fst-fast methods."""

import json

import pytest
from test_cli import data, files  # noqa: F401

from fst_fast import methods
from fst_fast.cli.main import main


def run(files, *more):  # noqa: F811
    arguments = [str(files / "suspect.pt"), *data(files), "--test", str(files / "clean")]
    arguments += ["--device", "cpu", "--batch-size", "12", "--out", str(files / "compared")]
    return main(["compare", *arguments, "--epochs", "1", "--quiet", "--force", *more])


def test_compare_prints_writes_and_goes_on(files, capsys):  # noqa: F811
    attack = ["--trigger", "badnets", "--trigger-option", "size=4", "--target", "1"]
    assert run(files, "--methods", "ft", "clp", *attack) == 0
    printed = capsys.readouterr().out
    for text in ("suspect", "ft", "clp", "attack success", "table.json"):
        assert text in printed
    table = json.loads((files / "compared" / "table.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["ft", "clp"]
    assert table["suspect"]["images"] == 36
    assert table["suspect"]["triggered_images"] == 24
    if pytest.importorskip("matplotlib"):
        assert (files / "compared" / "plot.png").exists()
    # A second run takes what is done, and adds what is not.
    assert run(files, "--methods", "ft", "clp", "lp", *attack) == 0
    again = json.loads((files / "compared" / "table.json").read_text())
    assert again["rows"][:2] == table["rows"]
    assert len(again["rows"]) == 3


def test_a_method_that_fails_is_told_by_the_exit_status(files, capsys, monkeypatch):  # noqa: F811
    def begin(self, run):
        raise ValueError("ft: not today")

    monkeypatch.setattr(methods.METHODS["ft"], "begin", begin)
    assert run(files, "--methods", "ft", "lp") == 1
    assert "ft: not today" in capsys.readouterr().out


def test_methods_are_listed_with_their_sources(capsys):
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(methods.available())
    by_name = {row["name"]: row for row in rows}
    assert "arXiv 2110.14430" in by_name["anp"]["source"]
    assert by_name["anp"]["needs"] == "batch norm"
    assert by_name["ft_sam"]["passes"] == "2"
    assert by_name["fst_auto"]["passes"] == "1, in 4 x the epochs"
    assert by_name["clp"]["settings"]["deviations"] == 3.0
    for name in methods.available():
        assert by_name[name]["source"].endswith((".", "``.")), name
        assert name in shown
