"""Methods of other packages, and the page that shows how to write one."""

import re
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from purify_cases import equal_states, make_batches, make_model, quick

from fst_fast import methods
from fst_fast.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


@dataclass(frozen=True)
class Still(methods.Method):
    """Leaves every weight as it is."""

    name: ClassVar[str] = "still"

    def gradients(self, run, batch, closure):
        out = closure(batch)
        run.model.zero_grad(set_to_none=True)
        return out


@pytest.fixture
def installed(monkeypatch):
    """Name the methods of this file as another package would, and a few that do not work."""
    names = {"still": "Still", "missing": "Missing", "other": "Still", "ft": "Still"}
    entries = [EntryPoint(name, f"{__name__}:{at}", methods.GROUP) for name, at in names.items()]
    monkeypatch.setattr(methods, "entry_points", lambda group: entries)


def test_a_method_of_another_package_is_found_by_its_name(installed):
    assert "still" in methods.available()
    assert methods.get("still") == Still()
    model = make_model()
    result = quick(model, make_batches(), method="still")
    assert result.settings["method"] == "still"
    for one, other in zip(result.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_ours_come_first(installed):
    assert type(methods.get("ft")) is methods.METHODS["ft"]
    assert methods.available().count("ft") == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing", r"method 'missing' of .*:Missing cannot be loaded: AttributeError"),
        ("other", r"method 'other' must be a subclass of fst_fast.methods.Method of that name"),
    ],
)
def test_one_that_does_not_work_is_named(name, text, installed):
    with pytest.raises(RuntimeError, match=text):
        methods.get(name)


def test_no_package_is_imported_for_the_list(monkeypatch):
    entry = EntryPoint("far", "no_such_package:Far", methods.GROUP)
    monkeypatch.setattr(methods, "entry_points", lambda group: [entry])
    assert "far" in methods.available()
    assert "no_such_package" not in sys.modules


def test_it_is_listed(monkeypatch, capsys):
    entry = EntryPoint("still", f"{__name__}:Still", methods.GROUP)
    monkeypatch.setattr(methods, "entry_points", lambda group: [entry])
    assert main(["methods"]) == 0
    assert "still" in capsys.readouterr().out


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.S | re.M)
    assert len(blocks) == 3
    assert max(len(block.splitlines()) for block in blocks) <= 30
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    names = {"__name__": "page"}
    exec(compile(script.read_text(), str(script), "exec"), names)
    assert "ft_sam" in capsys.readouterr().out
    assert [row.method for row in names["table"].rows] == ["ft", "noisy_weights"]
    assert all(row.metrics is not None for row in names["table"].rows)
    assert names["result"].settings["scale"] == 0.1
    model, batches = make_model(), make_batches()
    noisy = quick(model, batches, method=names["NoisyWeights"](scale=0.0))
    plain = quick(model, batches, method="ft")
    assert equal_states(noisy.model.state_dict(), plain.model.state_dict())


def test_the_page_names_the_group():
    assert f'[project.entry-points."{methods.GROUP}"]' in PAGE
