"""Native ops built ahead: when they are used, and when they are built where they are needed."""

import json

import gpu_bundle
import pytest

FITS = {"extension": ".cpython-312.so", "machine": "x86_64", "torch": "2.11.0+cu130"}
FITS["sources"] = "abc"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tree with a bundle that fits; its library holds the word of where it was built."""
    (tmp_path / "fst_fast").mkdir()
    bundle = tmp_path / "build" / "gpu_bundle"
    bundle.mkdir(parents=True)
    (bundle / "_C.cpython-312.so").write_text("bundle")
    (bundle / "_build_info.json").write_text("{}")
    (bundle / "bundle.json").write_text(json.dumps({**FITS, "architectures": "9.0"}))
    monkeypatch.setattr(gpu_bundle, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_bundle, "BUNDLE", bundle)
    monkeypatch.setattr(gpu_bundle, "MANIFEST", bundle / "bundle.json")
    monkeypatch.setattr(gpu_bundle, "here", lambda: dict(FITS))
    monkeypatch.setattr(gpu_bundle, "loads", lambda: library(tmp_path).exists())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    built = []

    def build(architectures, *options):
        built.append((architectures, *options))
        library(tmp_path).write_text("here")

    monkeypatch.setattr(gpu_bundle, "build_native", build)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return tmp_path, built


def library(root):
    return root / "fst_fast" / "_C.cpython-312.so"


def test_a_bundle_that_fits_is_put_in_place(place):
    root, built = place
    assert gpu_bundle.use() == "the bundle"
    assert library(root).read_text() == "bundle"
    assert (root / "fst_fast" / "_build_info.json").exists()
    assert not built


@pytest.mark.parametrize("name", FITS)
def test_one_for_something_else_is_refused_by_name_and_built(place, name, monkeypatch, capfd):
    _, built = place
    monkeypatch.setattr(gpu_bundle, "here", lambda: {**FITS, name: "another"})
    monkeypatch.setattr(gpu_bundle, "loads", lambda: bool(built))
    assert gpu_bundle.use() == "built here"
    assert built == [("9.0", "--inplace")]
    said = capfd.readouterr().out
    assert f"{name}: the bundle was built for {FITS[name]}, here it is another" in said
    assert said.count("refused") == 1


def test_one_for_another_gpu_is_refused(place, monkeypatch, capfd):
    _, built = place
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (10, 0))
    assert gpu_bundle.use() == "built here"
    assert built == [("10.0", "--inplace")]
    assert "GPU: the bundle was built for 9.0, this one is 10.0" in capfd.readouterr().out


def test_one_that_does_not_load_is_built_anew(place, monkeypatch, capfd):
    root, built = place
    monkeypatch.setattr(gpu_bundle, "loads", lambda: bool(built))
    assert gpu_bundle.use() == "built here"
    assert library(root).read_text() == "here"
    assert "it does not load" in capfd.readouterr().out


def test_without_a_bundle_they_are_built(place):
    root, _ = place
    (root / "build" / "gpu_bundle" / "bundle.json").unlink()
    assert gpu_bundle.use() == "built here"
    assert library(root).read_text() == "here"


def test_a_build_that_does_not_load_fails(place, monkeypatch):
    monkeypatch.setattr(gpu_bundle, "loads", lambda: False)
    with pytest.raises(SystemExit, match="do not load"):
        gpu_bundle.use()


def test_the_kernels_are_found_where_nothing_is_installed(place):
    root, _ = place
    (root / "kernels").mkdir()
    (root / "kernels" / "a.py").write_text("")
    gpu_bundle.use()
    assert (root / "fst_fast" / "kernels" / "a.py").exists()
    # A second time it is there.
    assert gpu_bundle.use() == "the bundle"


def test_the_sources_tell_a_change(tmp_path):
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "setup.py").write_text("one")
    (tmp_path / "csrc" / "cuda" / "a.cu").write_text("two")
    before = gpu_bundle.sources(tmp_path)
    assert before == gpu_bundle.sources(tmp_path)
    (tmp_path / "csrc" / "cuda" / "a.cu").write_text("three")
    assert gpu_bundle.sources(tmp_path) != before


def test_the_native_ops_here_load():
    if not gpu_bundle.loads():
        pytest.skip("C++ and CUDA are not both built here")
    assert set(gpu_bundle.here()) == set(FITS)
