"""Nothing in the package reads a file in a way that could run code from it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "fst_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
REQUIRED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
FORBIDDEN = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
CALLS = ("eval", "exec", "yaml.load", "yaml.unsafe_load", "torch.jit.load", "pd.read_pickle")


def faults(source):
    """What in the source could run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [name for name in names if name.split(".")[0] in FORBIDDEN]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in CALLS:
            found.append(called)
        if called in REQUIRED:
            name, value = REQUIRED[called]
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if given.get(name) is not value:
                found.append(f"{called} without {name}={value}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_read_by_pickle(path):
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as d",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "def f():\n    exec(text)",
        "yaml.load(text)",
    ],
)
def test_it_would_be_seen(source):
    assert faults(source)


def test_the_safe_ways_are_let_through():
    assert faults("torch.load(p, weights_only=True); np.load(p, allow_pickle=False)") == []
