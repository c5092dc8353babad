"""Holds the house to its plan: a file imports only what the table allows it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ANYTHING = ("",)

# File or folder -> which of our own modules it may import. Files of one folder may use each other.
# The folder kernels/ installs as fst_fast.kernels.
ALLOWED = {
    "__init__": ANYTHING,
    "kernels": (),
    "reference": (),
    "backends": ("reference", "kernels", "_C"),
    "ops": ("backends",),
    # state and pixels: for the trigger that networks make.
    "triggers": ("ops", "reference", "pixels", "state"),
    "poisoning": ("triggers",),
    "_uploads": (),
    "host_loader": (),
    "_lift_transforms": (),
    "decoding": (),
    "_lift_datasets": ("_lift_transforms", "decoding"),
    "lift": ("_lift_datasets", "_lift_transforms"),
    "pixels": (),
    "augment": (),
    "data": (
        "_uploads",
        "augment",
        "host_loader",
        "lift",
        "ops",
        "pixels",
        "poisoning",
        "triggers",
    ),
    "architectures": (),
    "files": (),
    "_state_dicts": (),
    # Runs in the reading process.
    "_pickles": ("_state_dicts",),
    "_pickle_facts": ("_pickles", "_state_dicts"),
    "_reader": ("_pickle_facts", "_pickles", "_state_dicts"),
    "sandbox": (),
    "manifest": ("files",),
    "untrusted": ("_state_dicts", "manifest", "sandbox"),
    "checkpoint": ("architectures", "files", "manifest", "untrusted"),
    "_head_graph": (),
    "_head_probe": ("_head_graph",),
    "heads": ("_head_graph", "_head_probe"),
    "methods": ("ops", "heads"),
    "_head_weight": ("_head_graph", "ops"),
    "drop_in": ("_head_weight", "features", "heads", "methods", "ops"),
    "projection": ("_head_weight", "drop_in", "ops"),
    "inputs": ("data",),
    "progress": (),
    "state": (),
    "guard": (),
    "averaging": (),
    "features": ("heads", "state"),
    "folding": ("heads",),
    "memory": (),
    "arrangement": ("heads", "inputs", "memory", "state"),
    "feed": ("data", "inputs"),
    "rehearsal": (),
    "graphs": ("rehearsal",),
    "ledger": ("progress",),
    "step": ("features", "feed", "guard", "heads", "inputs", "memory", "methods", "ops"),
    "profiling": ("inputs",),
    "loop": (
        *("averaging", "features", "feed", "graphs", "host_loader", "inputs", "ledger", "methods"),
        *("memory", "progress", "state", "step"),
    ),
    "showing": ("data", "inputs", "pixels", "triggers"),
    "evaluate": ("data", "folding", "heads", "inputs", "pixels", "showing", "state", "triggers"),
    "resume": ("arrangement", "files", "host_loader", "loop", "progress"),
    "examine": ("data", "evaluate", "inputs", "pixels", "report", "triggers"),
    "result": (
        *("checkpoint", "examine", "files", "heads", "inputs", "pixels", "progress", "report"),
        "triggers",
    ),
    "purify": (
        *("arrangement", "backends", "loop", "features", "heads", "methods", "data", "evaluate"),
        *("graphs", "inputs", "progress", "result", "resume", "state", "step"),
    ),
    "many": ("architectures", "checkpoint", "inputs", "purify", "result", "resume"),
    "sweep": (
        *("_cli_values", "architectures", "arrangement", "checkpoint", "data", "evaluate", "files"),
        *("inputs", "lab", "methods", "pixels", "progress", "purify", "result", "triggers"),
    ),
    "lab": ANYTHING,
    # Results come to it as plain data.
    "report": ("files",),
    "bench": ANYTHING,
    "inspect_file": ("files", "manifest", "untrusted"),
    "_cli_inputs": ("_cli_values", "checkpoint", "data", "lab"),
    "_cli_inspect": ("inspect_file",),
    "_cli_lab": (
        *(
            "_cli_lab_table",
            "_cli_values",
            "arrangement",
            "checkpoint",
            "evaluate",
            "inputs",
            "lab",
            "poisoning",
        ),
    ),
    "_cli_lab_table": ("arrangement", "bench", "inputs", "lab", "progress", "sweep"),
    "_cli_report": ANYTHING,
    "_cli_sweep": ("sweep",),
    "_cli_triggers": ANYTHING,
    "_cli_values": ("pixels",),
    "cli": ANYTHING,
    "__main__": ANYTHING,
}
# What a layer may import from outside, where the plan limits it.
OUTSIDE = {
    "kernels": ("torch", "triton"),
    "reference": ("torch",),
    "_head_graph": ("torch",),
    "_head_probe": ("torch",),
    "heads": ("torch",),
    "checkpoint": ("torch", "safetensors"),
    # The reading process starts with these: what they import, every first .pt waits for.
    "_state_dicts": ("torch",),
    "_pickles": ("torch",),
    "_pickle_facts": ("torch",),
    "_reader": ("torch",),
    "sandbox": (),
}


def layer_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imports(source, package):
    """Every module that the source imports, by its full name; ``package`` resolves the dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from fst_fast import ops` names a module; `from fst_fast.ops import f` a function.
            yield from (f"{base}.{a.name}" if base == "fst_fast" else base for a in node.names)


def forbidden(source, layer, package):
    """The imports that the table does not allow a file of ``layer``."""
    allowed = ALLOWED[layer]
    outside = OUTSIDE.get(layer)
    for name in imports(source, package):
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if first == "fst_fast":
            if allowed is not ANYTHING and target not in (*allowed, layer):
                yield name
        elif outside is not None and first not in (*outside, *sys.stdlib_module_names):
            yield name


def package_of(path):
    folder = path.relative_to(ROOT).parent
    return ".".join(("fst_fast", "kernels") if folder.parts[0] == "kernels" else folder.parts)


FILES = [f for top in ("fst_fast", "kernels") for f in sorted((ROOT / top).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    layer = layer_of(path)
    assert layer in ALLOWED, f"{path.name}: give {layer!r} a row in ALLOWED, and in the design"
    wrong = sorted(set(forbidden(path.read_text(), layer, package_of(path))))
    assert not wrong, f"{layer} may import {ALLOWED[layer]}, not {wrong}"


@pytest.mark.parametrize(
    ("source", "layer", "wrong"),
    [
        ("from fst_fast.purify import purify", "ops", ["fst_fast.purify"]),
        ("from fst_fast import purify", "ops", ["fst_fast.purify"]),
        ("import fst_fast.loop as loop", "triggers", ["fst_fast.loop"]),
        ("from ..ops import head_step_", "reference", ["fst_fast.ops"]),
        ("from .. import ops", "reference", ["fst_fast.ops"]),
        ("def late():\n    import fst_fast.cli", "heads", ["fst_fast.cli"]),
        ("import numpy", "reference", ["numpy"]),
        ("from triton import language", "reference", ["triton"]),
        ("import torch\nimport math\nfrom fst_fast.reference import x", "reference", []),
        ("from fst_fast.data import x", "lab", []),
    ],
)
def test_a_wrong_arrow_is_found(source, layer, wrong):
    assert list(forbidden(source, layer, f"fst_fast.{layer}")) == wrong
