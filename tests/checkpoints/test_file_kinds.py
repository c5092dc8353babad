"""Files that are something else are named for what they are; shards are read as one."""

import gzip
import json
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_cases import Net, equal, refused, torch_save
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fst_fast import checkpoints
from fst_fast.checkpoints import LoadError, load, read_state_dict
from fst_fast.checkpoints.inspect_file import inspect_file
from fst_fast.cli import main

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)
# A model of format 8 that names its producer, as PyTorch's exporter writes it.
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x10\n\x03foo\x12\x09" + bytes(100)
STARTS = {
    "lfs": (POINTER, "a Git LFS pointer for 12345 bytes", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s1--ab.pt\n", "a git-annex pointer", "git annex get"),
    "onnx": (ONNX, "an ONNX model", "exported from"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(80), "an HDF5 file", "convert it"),
    "html": (b"\n<!DOCTYPE html><html><body>404", "a web page (HTML)", "download the file itself"),
    "xml": (b'<?xml version="1.0"?><Error>NoSuchKey', "a web page", "download the file itself"),
    "json": (b'{"_name_or_path": "x", "architectures": []}', "JSON text", "name the weights"),
    "answer": (b"Entry not found", "the text 'Entry not found'", "fetch it again"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(40), "a GGUF file", "PyTorch weights instead"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(40), "a TensorFlow Lite model", "PyTorch weights"),
    "gzip": (gzip.compress(bytes(200)), "a gzip archive", "unpack it"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG image", "name the model file"),
}


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("kind", STARTS)
def test_what_it_is_and_what_to_do(tmp_path, capsys, kind, suffix):
    data, what, remedy = STARTS[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    text = refused(path, what, remedy)
    assert "damaged" not in text
    assert "operand" not in text
    facts = inspect_file(path)
    assert facts["kind"] == "something else"
    assert what in facts["refused"]
    assert main.main(["inspect", str(path)]) == 1
    assert what in capsys.readouterr().out


def test_arrays_and_archives(tmp_path):
    np.save(tmp_path / "w.npy", np.zeros(3))
    refused(tmp_path / "w.npy", "a NumPy array (.npy)", "torch.save")
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    refused(tmp_path / "w.npz", "an archive of NumPy arrays (.npz)")
    path = torch_save(tmp_path / "m.pt", Net().state_dict())
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.write(path, "m.pt")
    refused(tmp_path / "m.zip", "a zip archive of other files (m.pt); unpack it")
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        archive.add(path, "m.pt")
    refused(tmp_path / "m.tar", "a tar archive", "unpack it")


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "model"])
def test_the_content_decides_what_is_safetensors(tmp_path, name):
    state = Net().state_dict()
    safetensors.torch.save_file(state, tmp_path / name)
    assert equal(read_state_dict(tmp_path / name), state)
    assert inspect_file(tmp_path / name)["kind"] == "safetensors"


def test_a_pickle_named_safetensors_stays_refused(tmp_path):
    path = torch_save(tmp_path / "m.safetensors", Net().state_dict())
    refused(path, "written by torch.save must not end in .safetensors")


def write_shards(folder, state, suffix="safetensors", name="model"):
    """Two shards and their index, as transformers writes them."""
    names = list(state)
    mapped = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"{name}-{number:05}-of-00002.{suffix}"
        tensors = {n: state[n] for n in part}
        save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
        save(tensors, folder / file)
        mapped |= dict.fromkeys(part, file)
    index = folder / f"{name}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapped}))
    return index


@pytest.mark.parametrize(("suffix", "name"), [("safetensors", "model"), ("bin", "pytorch_model")])
def test_a_folder_of_shards_is_one_model(tmp_path, capsys, suffix, name):
    model = Net()
    index = write_shards(tmp_path, model.state_dict(), suffix, name)
    for path in (tmp_path, index):
        assert equal(read_state_dict(path), model.state_dict())
        facts = inspect_file(path)
        assert facts["kind"] == "2 files"
        assert {tensor["name"] for tensor in facts["tensors"]} == set(model.state_dict())
        assert facts["refused"] is None
        assert facts["sha256"] == checkpoints.digest(path)
    loaded = load(tmp_path, Net)
    assert equal(loaded.state_dict(), model.state_dict())
    assert main.main(["inspect", str(tmp_path)]) == 0
    assert "fc.weight" in capsys.readouterr().out
    before = checkpoints.digest(tmp_path)
    with torch.no_grad():
        model.fc.bias.add_(1)
    write_shards(tmp_path, model.state_dict(), suffix, name)
    assert checkpoints.digest(tmp_path) != before


def test_a_folder_with_one_file(tmp_path):
    state = Net().state_dict()
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert equal(read_state_dict(tmp_path), state)
    shutil.copy(tmp_path / "weights.safetensors", tmp_path / "other.safetensors")
    refused(tmp_path, "a directory with 2 of them", "name the file inside it")
    shutil.copy(tmp_path / "weights.safetensors", tmp_path / "model.safetensors")
    assert equal(read_state_dict(tmp_path), state)


def rewritten(index, change):
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def test_shards_that_do_not_fit_their_index(tmp_path):
    index = write_shards(tmp_path, Net().state_dict())
    first, second = sorted(tmp_path.glob("*.safetensors"))
    rewritten(index, lambda mapped: mapped.update({"more.weight": first.name}))
    refused(tmp_path, "model.safetensors.index.json lists", "more.weight", "fetch all shards again")
    rewritten(index, lambda mapped: mapped.pop("more.weight"))
    rewritten(index, lambda mapped: mapped.pop("fc.bias"))
    refused(tmp_path, "fc.bias")
    rewritten(index, lambda mapped: mapped.update({"fc.bias": first.name}))
    refused(tmp_path, "fc.bias")
    rewritten(index, lambda mapped: mapped.update({"fc.bias": second.name}))
    second.write_bytes(POINTER)
    with pytest.raises(LoadError, match=r"00002-of-00002.* a Git LFS pointer"):
        read_state_dict(tmp_path)
    second.unlink()
    with pytest.raises(LoadError, match=r"00002-of-00002.* no such file"):
        read_state_dict(tmp_path)
    safetensors.torch.save_file(Net().state_dict(), second)
    refused(tmp_path, "each tensor once")


@pytest.mark.parametrize(
    "name", ["../m.safetensors", "/m.safetensors", "a/m.safetensors", "..", ""]
)
def test_an_index_sends_its_reader_nowhere_else(tmp_path, name):
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    for place in (tmp_path, folder / "a"):
        safetensors.torch.save_file(Net().state_dict(), place / "m.safetensors")
    content = {"weight_map": dict.fromkeys(Net().state_dict(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(folder, "names of files beside model.safetensors.index.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', "[" * 100_000])
def test_damaged_indexes(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    refused(path, "an index of shards")


@pytest.mark.parametrize("wrapper", [AveragedModel, lambda m: AveragedModel(nn.DataParallel(m))])
def test_averaged_models_load(tmp_path, wrapper):
    model = Net()
    averaged = wrapper(model)
    assert "n_averaged" in averaged.state_dict()
    for path in (
        torch_save(tmp_path / "m.pt", averaged.state_dict()),
        torch_save(tmp_path / "wrapped.pt", {"state_dict": averaged.state_dict(), "epoch": 3}),
    ):
        loaded = load(path, Net)
        assert equal(loaded.state_dict(), model.state_dict())


def test_a_tensor_that_is_only_called_so_stays(tmp_path):
    state = {"n_averaged": torch.ones(2), "fc.weight": torch.ones(3)}
    assert set(read_state_dict(torch_save(tmp_path / "m.pt", state))) == set(state)


def test_inspect_shows_the_head(tmp_path, capsys):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)], nn.Linear(4, 7))
    path = torch_save(tmp_path / "m.pt", model.state_dict())
    assert main.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "20.weight  float32 [7, 4]" in text
    assert "20.bias  float32 [7]" in text
    assert "0.weight  float32 [4, 4]" in text
    assert "--json lists all 42" in text


def test_every_start_of_pickles_and_zips_is_still_a_model(tmp_path):
    # The first bytes of what PyTorch writes must never look like something else.
    for zipped in (True, False):
        state = Net().state_dict()
        assert equal(read_state_dict(torch_save(tmp_path / "m.pt", state, zipped)), state)
    header = struct.pack("<Q", 2) + b"{}"
    (tmp_path / "m.pt").write_bytes(header)
    refused(tmp_path / "m.pt", "no tensor at all")
