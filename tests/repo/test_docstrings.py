"""Every public function and class shows one example in its docstring, and the examples run."""

import doctest
import inspect

import pytest
import torch

import fst_fast

ROOMS = (fst_fast, fst_fast.heads, fst_fast.ops, fst_fast.methods, fst_fast.triggers, fst_fast.lab)
# An alias of a type has no docstring of its own.
ALIASES = {"fst_fast.methods.Closure"}


def public():
    """The public functions and classes, by qualified name."""
    found = {}
    for room in ROOMS:
        for name in room.__all__:
            value = getattr(room, name)
            if callable(value) and not inspect.ismodule(value):
                found[f"{room.__name__}.{name}"] = value
    return {name: value for name, value in found.items() if name not in ALIASES}


PUBLIC = public()


def examples(name):
    """The examples of a docstring, as one test that knows fst_fast and torch."""
    text = inspect.cleandoc(PUBLIC[name].__doc__ or "")
    names = {"fst_fast": fst_fast, "torch": torch, "__name__": "example"}
    return doctest.DocTestParser().get_doctest(text, names, name, None, 0)


def run(test):
    """What went wrong, in doctest's words; empty where nothing did."""
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    return "".join(report)


def test_every_room_has_public_names():
    assert {name.rpartition(".")[0] for name in PUBLIC} == {room.__name__ for room in ROOMS}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_has_an_example(name):
    assert examples(name).examples, f"{name}: its docstring must show an example (>>>), got none"


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("error::UserWarning:example")
@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(examples(name)) == ""
    assert not list(tmp_path.iterdir())


def test_a_wrong_example_is_found():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert "Expected:\n    3\nGot:\n    2" in run(test)
