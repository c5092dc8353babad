"""The README's snippets run, its tables are those of the records, its commands exist."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fst_fast.cli.main import _parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.S | re.M)
    return [text for name, text in found if name == language]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lightning", "transformers")),
    reason="the snippets show Lightning and transformers",
)
def test_python_snippets_run_in_order(tmp_path):
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(blocks("python")))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "attack success" in result.stdout
    assert (tmp_path / "purified.safetensors").exists()
    assert (tmp_path / "purified.json").exists()


def test_tables_come_from_the_records():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "line",
    [
        line
        for block in blocks("")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("fst-fast")
    ],
)
def test_command_lines_parse(line):
    _parser().parse_args(line.split()[1:])
