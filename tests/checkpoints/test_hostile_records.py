"""hostile.records and the table that benchmarks/tables.py makes of them."""

import json

import record_files
import tables
from hostile import records


def test_a_record_becomes_a_table(tmp_path, monkeypatch):
    rows = [records.row("files that ran code", 61, 0), records.row("memory, MB", 9, 40, 256)]
    path = records.write("files", rows, 90, tmp_path / "hostile")
    record = json.loads(path.read_text())
    assert record["suite"] == "files"
    assert record["rows"] == rows
    assert path.name == f"{record['date']}-files.json"
    monkeypatch.setattr(record_files, "RESULTS", tmp_path)
    table = tables.fill("<!-- table: reliability -->\n<!-- end -->", tmp_path / "page.md")
    assert "| files that ran code | 61 | 0 | 0 |\n| memory, MB | 9 | 40 | 256 |" in table
    assert f"`files`, {record['date']}" in table


def test_what_is_over_its_limit_is_seen():
    assert records.within(records.row("x", 3, 0))
    assert not records.within(records.row("x", 3, 1))
    assert not records.within(records.row("x", 0, 0)), "nothing was tried"
