"""The examples run in their short form, each stays short, and each says what it needs."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "suspect.py")
NEEDS = {"compare_methods.py": ("matplotlib",), "imagefolder_timm.py": ("timm",)}
# What a script prints at its end, and only where it came that far.
PRINTED = {
    "compare_methods.py": "plot.png",
    "imagefolder_timm.py": " after",
    "own_loop.py": "after: clean accuracy",
    "published_checkpoint.py": "after: clean accuracy",
    "sweep.py": "fst",
    "text_model.py": "after: clean accuracy",
}


def run(name, monkeypatch, *arguments):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, "--short", *map(str, arguments)])
    status = 0
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    assert status == 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs(name, monkeypatch, tmp_path, capsys):
    for package in ("sklearn", *NEEDS.get(name, ())):
        pytest.importorskip(package, reason=f"{name} needs {package}")
    folder = [tmp_path] if name in ("compare_methods.py", "sweep.py") else []
    run(name, monkeypatch, *folder)
    assert PRINTED[name] in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_short_and_listed(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 60
    assert f"]({name})" in (EXAMPLES / "README.md").read_text()
