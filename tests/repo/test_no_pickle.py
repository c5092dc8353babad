"""Nothing in the project, but for its tests, reads a file in a way that could run code from it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def found(folder):
    """Python files of a folder and those below; of the top, those alone."""
    return (ROOT / folder).glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py")


FOLDERS = ("fst_fast", "kernels", "benchmarks")
FILES = sorted(path for folder in (*FOLDERS, ".") for path in found(folder))
REQUIRED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
FORBIDDEN = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
CALLS = (
    *("eval", "exec", "__import__", "yaml.load", "yaml.full_load", "yaml.unsafe_load"),
    *("torch.jit.load", "torch.serialization.load", "torch.hub.load", "torch.package"),
    *("pd.read_pickle", "pandas.read_pickle", "torch.serialization.add_safe_globals"),
)
# Under another name a call would not be seen.
LOADERS = dict.fromkeys(("torch", "torch.serialization", "numpy", "yaml"), ("load",))
SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def faults(source):
    """What in the source could run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            loaders = LOADERS.get(node.module or "", ())
            found += [alias.name for alias in node.names if alias.name in loaders]
        elif isinstance(node, ast.Constant) and node.value == SWITCH:
            found.append(SWITCH)
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
        "from torch import load",
        "from torch.serialization import load as read",
        "torch.serialization.load(path, weights_only=True)",
        "__import__('pickle')",
        "os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'",
    ],
)
def test_it_would_be_seen(source):
    assert faults(source)


def test_every_file_is_looked_at():
    names = {str(path.relative_to(ROOT)) for path in FILES}
    assert {"setup.py", "fst_fast/checkpoints/pickle_reader.py", "fst_fast/lab/demo.py"} < names
    assert {"benchmarks/tables.py", "kernels/inject.py"} < names


def test_the_safe_ways_are_let_through():
    assert faults("torch.load(p, weights_only=True); np.load(p, allow_pickle=False)") == []
