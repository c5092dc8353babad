"""benchmarks/passes.py: a step against the passes that its method tells."""

import json

import passes as script
import pytest

from fst_fast import methods


def test_a_row_is_written_once(monkeypatch, tmp_path, capsys):
    ticks = iter(range(1000))
    monkeypatch.setattr(script, "WIDTH", 2)
    monkeypatch.setattr(script.time, "process_time", lambda: next(ticks))
    path = tmp_path / "passes.json"
    call = ["passes.py", "--methods", "ft", "--epochs", "1", "--batch-size", "4"]
    monkeypatch.setattr("sys.argv", [*call, "--record", str(path)])
    script.main()
    (row,) = json.loads(path.read_text())["rows"]
    # A pass and an epoch are each one tick of this clock, for four batches.
    assert (row["step_ms"], row["pass_ms"]) == (250, 250)
    assert (row["ratio"], row["within"]) == (1.0, True)
    assert "ft " in capsys.readouterr().out
    monkeypatch.setattr(script, "measured", None)
    script.main()
    monkeypatch.setattr("sys.argv", [*call, "--batch-size", "5", "--record", str(path)])
    with pytest.raises(SystemExit, match="is of another protocol"):
        script.main()


def test_all_methods_are_measured_but_those_without_a_pass_in_each_step():
    assert set(script.APART) <= set(methods.METHODS)
    assert all(methods.get(name, **given) for name, given in script.ALONE.items())
    for name in set(methods.METHODS) - set(script.APART):
        assert methods.METHODS[name].passes_per_image() > 0
