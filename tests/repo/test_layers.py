"""Holds the house to its plan: a room imports only from rooms above it."""

import sys

import pytest
import rooms

# What a file or a room may import from outside the package, where the plan limits it.
OUTSIDE = {
    "kernels/": ("torch", "triton"),
    "fst_fast/ops/reference/": ("torch",),
    "fst_fast/heads/find.py": ("torch",),
    "fst_fast/heads/evidence.py": ("torch",),
    "fst_fast/heads/probe.py": ("torch",),
    "fst_fast/heads/proof.py": ("torch",),
    "fst_fast/heads/copies.py": ("torch",),
    "fst_fast/checkpoints/load.py": ("torch", "safetensors"),
    # The reading process starts with these: what they import, every first .pt waits for.
    "fst_fast/checkpoints/state_dicts.py": ("torch",),
    "fst_fast/checkpoints/pickle_reader.py": ("torch",),
    "fst_fast/checkpoints/pickle_inspect.py": ("torch",),
    "fst_fast/checkpoints/reader_process.py": ("torch",),
    "fst_fast/checkpoints/reader_client.py": (),
}
# The reading process boots under stand-ins for the packages: its files import each other alone.
READER = ("state_dicts", "pickle_reader", "pickle_inspect", "reader_process")


def may_import(room, other):
    """Whether a file of one room may import from another; "" is the door, which none may."""
    if room == "":
        return other in rooms.ROOMS
    if room == "kernels":
        return False
    if other == "kernels":
        return room == "ops"
    return other in rooms.ROOMS and rooms.ROOMS.index(other) < rooms.ROOMS.index(room)


def forbidden(source, package, path=""):
    """The modules that a file of ``package`` imports and may not."""
    room = "" if package == "fst_fast" else rooms.room_of(f"{package}.x")
    outside = next((names for start, names in OUTSIDE.items() if path.startswith(start)), None)
    wrong = []
    for module in rooms.imports(source, package):
        other = rooms.room_of(module)
        if other is not None:
            native = module in ("fst_fast", "fst_fast._C")
            if other != room and not native and not may_import(room, other):
                wrong.append(module)
        elif outside is not None and module.partition(".")[0] not in (
            *outside,
            *sys.stdlib_module_names,
        ):
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("path", rooms.files(), ids=lambda path: str(path.relative_to(rooms.ROOT)))
def test_a_room_imports_only_from_rooms_above_it(path):
    name = str(path.relative_to(rooms.ROOT))
    assert forbidden(path.read_text(), rooms.package_of(path), name) == []


def test_every_folder_is_a_room():
    folders = {name for name in rooms.entries() if not name.endswith(".py")}
    assert folders == set(rooms.ROOMS)
    assert len(rooms.entries()) <= 14


def test_the_rooms_are_loosely_joined():
    found = [(here, there) for here, there in rooms.arrows() if there]
    graph = {room: {there for here, there in found if here == room} for room in rooms.ROOMS}
    longest, cycle = rooms.chains(graph)
    assert len(found) <= 70
    assert longest <= 11
    assert not cycle


def test_what_the_sweep_takes_from_the_benches_is_what_a_record_is():
    for path in (rooms.PACKAGE / "sweep").rglob("*.py"):
        taken = rooms.imports(path.read_text(), rooms.package_of(path))
        shared = {f"fst_fast.bench.{name}" for name in ("machine", "records", "table")}
        assert {module for module in taken if rooms.room_of(module) == "bench"} <= shared


@pytest.mark.parametrize("name", READER)
def test_the_reading_process_imports_nothing_beside_itself(name):
    path = rooms.PACKAGE / "checkpoints" / f"{name}.py"
    own = [m for m in rooms.imports(path.read_text(), "fst_fast.checkpoints") if "fst_fast" in m]
    assert set(own) <= {f"fst_fast.checkpoints.{other}" for other in READER}


@pytest.mark.parametrize(
    ("source", "package", "wrong"),
    [
        ("from fst_fast.tuning.purify import purify", "fst_fast.ops", ["fst_fast.tuning.purify"]),
        ("from fst_fast import tuning", "fst_fast.ops", ["fst_fast.tuning"]),
        ("import fst_fast.tuning.loop as loop", "fst_fast.triggers", ["fst_fast.tuning.loop"]),
        ("from ...triggers import x", "fst_fast.ops.reference", ["fst_fast.triggers.x"]),
        ("from ... import triggers", "fst_fast.ops.reference", ["fst_fast.triggers"]),
        ("def late():\n    import fst_fast.cli.main", "fst_fast.heads", ["fst_fast.cli.main"]),
        ("from ..bench import records", "fst_fast.lab", ["fst_fast.bench.records"]),
        ("import fst_fast.kernels.inject", "fst_fast.data", ["fst_fast.kernels.inject"]),
        ("from ..data.batches import x", "fst_fast.lab", []),
        ("from .. import ops", "fst_fast.heads", []),
    ],
)
def test_a_wrong_arrow_is_found(source, package, wrong):
    assert forbidden(source, package) == wrong


@pytest.mark.parametrize(
    ("source", "path", "wrong"),
    [
        ("import numpy", "fst_fast/ops/reference/inject.py", ["numpy"]),
        ("from triton import language", "fst_fast/ops/reference/inject.py", ["triton"]),
        ("import torch\nimport math", "fst_fast/ops/reference/inject.py", []),
        ("import torch", "fst_fast/checkpoints/reader_client.py", ["torch"]),
    ],
)
def test_a_library_too_many_is_found(source, path, wrong):
    package = path.rpartition("/")[0].replace("/", ".")
    assert forbidden(source, package, path) == wrong


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}}, (3, False)),
        ({"a": {"b"}, "b": {"a"}}, (2, True)),
        ({}, (0, False)),
    ],
)
def test_chains_and_cycles_are_counted(graph, expected):
    assert rooms.chains(graph) == expected
