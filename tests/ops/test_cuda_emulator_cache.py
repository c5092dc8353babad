"""The compiled emulation: made once for its sources, and again when they change."""

import emulated_cases
import pytest


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """A tree of its own; the folder's name for each time that something was compiled."""
    for name in ("csrc", "cuda_emulator"):
        (tmp_path / name / "cuda").mkdir(parents=True)
        (tmp_path / name / "cuda" / "a.cu").write_text(name)
    monkeypatch.setattr(emulated_cases, "ROOT", tmp_path)
    monkeypatch.setattr(emulated_cases, "CACHE", tmp_path / "build")
    sources = (tmp_path / "csrc", tmp_path / "cuda_emulator")
    monkeypatch.setattr(emulated_cases, "SOURCES", sources)
    made = []

    def compile_ops(library):
        made.append(library)
        library.write_text("compiled")

    monkeypatch.setattr(emulated_cases, "compile_ops", compile_ops)
    return made


def test_the_same_sources_are_compiled_once(compiled):
    first = emulated_cases.build()
    assert first.read_text() == "compiled"
    assert emulated_cases.build() == first
    assert len(compiled) == 1


@pytest.mark.parametrize("folder", ["csrc", "cuda_emulator"])
def test_a_changed_source_is_compiled_and_the_old_library_removed(compiled, folder, tmp_path):
    first = emulated_cases.build()
    (tmp_path / folder / "cuda" / "a.cu").write_text("changed")
    second = emulated_cases.build()
    assert second != first
    assert second.exists()
    assert not first.exists()
    assert len(compiled) == 2


@pytest.mark.parametrize(("name", "value"), [("FLAGS", ("-O2",)), ("COMPILER", "c++ -g")])
def test_another_compiler_is_another_library(compiled, monkeypatch, name, value):
    first = emulated_cases.build()
    monkeypatch.setattr(emulated_cases, name, value)
    assert emulated_cases.build() != first


def test_what_failed_is_compiled_again(compiled, monkeypatch):
    def fail(library):
        library.write_text("half")
        raise AssertionError("no memory")

    real = emulated_cases.compile_ops
    monkeypatch.setattr(emulated_cases, "compile_ops", fail)
    with pytest.raises(AssertionError, match="no memory"):
        emulated_cases.build()
    monkeypatch.setattr(emulated_cases, "compile_ops", real)
    assert emulated_cases.build().read_text() == "compiled"
