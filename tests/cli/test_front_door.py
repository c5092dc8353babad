"""The command line as people expect it: version, examples, completion, Ctrl-C."""

import importlib.util
import sys

import pytest

import fst_fast
from fst_fast.cli import inspect
from fst_fast.cli.examples import EXAMPLES
from fst_fast.cli.main import build_parser, main


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fst-fast {fst_fast.__version__}\n"


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_shows_an_example_that_parses(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert EXAMPLES[name] in capsys.readouterr().out
    parsed = build_parser().parse_args(EXAMPLES[name].replace("\\\n", "").split()[1:])
    assert parsed.command == name


@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="needs shtab")
def test_completion_knows_the_options(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "--normalize" in script
    assert "purify" in script


def test_completion_without_shtab_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "zsh"]) == 1
    assert 'pip install "fst_fast[completion]"' in capsys.readouterr().err


def test_an_interrupted_command_ends_with_130(monkeypatch, capsys, tmp_path):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupted)
    assert main(["inspect", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
