"""What gets installed where nothing can be compiled: everything but the native ops."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "kernels", "fst_fast")


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, so that a build leaves the working tree alone."""
    copy = tmp_path / "tree"
    copy.mkdir()
    left_out = shutil.ignore_patterns("__pycache__", "_C*", "_build_info.json")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=left_out)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    # Leftovers of an earlier native build must not travel.
    (copy / "fst_fast" / "_C.stale.so").write_bytes(b"stale")
    (copy / "fst_fast" / "_build_info.json").write_text('{"built": true}')
    return copy


def wheel_of(tree, **environment):
    out = tree.parent / "wheels"
    # How this installation was asked for says nothing about the one under test.
    inherited = {name: value for name, value in os.environ.items() if name != "FST_FAST_BUILD"}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    result = subprocess.run(
        [*pip, "-q", "-w", str(out), str(tree)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def assert_pure(wheel, reason):
    assert wheel.name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = json.loads(archive.read("fst_fast/_build_info.json"))
    for name in ("py.typed", "kernels/head_step.py", "ops/reference/head_step.py"):
        assert f"fst_fast/{name}" in names
    report = "fst_fast/measure/report"
    assert {f"{report}/page.html.jinja", f"{report}/page.css"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]
    assert not [name for name in names if name.startswith(("kernels/", "csrc/", "tests/"))]
    assert not info["built"]
    assert reason in info["reasons"]["cpu"]
    assert reason in info["reasons"]["cuda"]


def test_told_not_to_build(tree):
    assert_pure(wheel_of(tree, FST_FAST_BUILD="0"), "FST_FAST_BUILD=0")


def test_build_isolation_has_no_torch(tree, tmp_path):
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "torch.py").write_text('raise ModuleNotFoundError("No module named torch")\n')
    wheel = wheel_of(tree, PYTHONPATH=str(stub))
    assert_pure(wheel, "pip install --no-build-isolation")


def test_no_compiler(tree):
    assert_pure(wheel_of(tree, CXX="no-such-compiler"), "no-such-compiler not found")


def test_a_failed_build_is_loud_and_claims_nothing(tree):
    (tree / "csrc" / "ops.cpp").write_text("#error broken on purpose\n")
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "FST_FAST_BUILD": "cpu", "CXX": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "FST_FAST_BUILD=0" in result.stderr
    info = json.loads((tree / "fst_fast" / "_build_info.json").read_text())
    assert not info["built"]


@pytest.mark.parametrize("value", ["yes", ""])
def test_an_unknown_setting_is_refused(tree, value):
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=tree,
        env={**os.environ, "FST_FAST_BUILD": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "FST_FAST_BUILD must be 0, 1 or cpu" in result.stderr
