"""fst-fast inspect: what a file holds, without loading it."""

import argparse
import json

import pytest
import torch
from checkpoint_cases import Net, torch_save
from hostile import pickles

from fst_fast.checkpoints import LoadError, save
from fst_fast.checkpoints.inspect_file import inspect_file
from fst_fast.cli import main


def shown(capsys, *arguments):
    status = main.main(["inspect", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_a_checkpoint_of_ours(tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    manifest = save(path, Net(), {"seed": 3})
    status, text = shown(capsys, path, "--json")
    facts = json.loads(text)
    assert status == 0
    assert facts["kind"] == "safetensors"
    assert facts["sha256"] == manifest["sha256"]
    assert facts["manifest"] == manifest
    assert facts["manifest_fault"] is facts["refused"] is facts["globals"] is None
    assert {"name": "fc.weight", "dtype": "F32", "shape": [3, 4]} in facts["tensors"]
    assert facts["parameters"] == sum(v.numel() for v in Net().state_dict().values() if v.dim())
    status, text = shown(capsys, path)
    assert "manifest: matches" in text
    assert "seed 3" in text
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    status, text = shown(capsys, path)
    assert status == 1
    assert "manifest: does not match: SHA-256" in text


def test_a_wrapped_pickle(tmp_path, capsys):
    content = {"epoch": 3, "state_dict": Net().state_dict(), "args": argparse.Namespace(lr=1)}
    path = torch_save(tmp_path / "m.pt", content)
    status, text = shown(capsys, path)
    assert status == 0
    assert "state dict under: state_dict" in text
    assert "beside it: epoch (int), args (Ignored)" in text
    assert "fc.weight  float32 [3, 4]" in text
    assert "torch._utils._rebuild_tensor_v2: allowed" in text
    assert "argparse.Namespace: ignored" in text


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_model(tmp_path, capsys, zipped):
    path = torch_save(tmp_path / "m.pt", Net(), zipped)
    facts = inspect_file(path)
    assert facts["globals"]["checkpoint_cases.Net"] == "an object"
    assert facts["tensors"] is None
    assert facts["kind"] == ("zip" if zipped else "pickle")
    assert f"torch.load({str(path)!r}, weights_only=False)" in facts["refused"]
    assert shown(capsys, path)[0] == 1


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("OBJ", "os.system"),
        ("INST", "os.system"),
        ("STACK_GLOBAL", "os.system"),
        ("STACK_GLOBAL from the memo", "os.system"),
        ("protocol 0", "os.system"),
        ("protocol 5", "builtins.eval"),
        ("after the weights, thrown away", "os.system"),
        ("old format, pickle 3", "os.system"),
    ],
)
def test_code_is_named_and_not_run(tmp_path, name, asked):
    canary = tmp_path / "canary"
    path = tmp_path / "m.pt"
    path.write_bytes(pickles.FORMS[name](str(canary)))
    facts = inspect_file(path)
    assert facts["globals"][asked] == "can run code"
    assert facts["refused"]
    assert not canary.exists()


def test_a_name_that_is_computed_is_not_hidden(tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(b"\x80\x04\x8c\x02os\x8c\x06system0N\x93.")
    assert list(inspect_file(path)["globals"]) == ["?"]


def test_a_pickle_by_the_name_of_a_safetensors_file(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(pickles.whole(pickles.evil(str(tmp_path / "canary"))))
    facts = inspect_file(path)
    assert facts["globals"] == {"os.system": "can run code"}
    assert "is a pickle" in facts["refused"]


def test_garbage_and_nothing(tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"garbage " * 9)
    assert "is no safetensors file" in inspect_file(path)["refused"]
    other = tmp_path / "m.pt"
    other.write_bytes(b"garbage " * 9)
    assert inspect_file(other)["unread"]
    with pytest.raises(LoadError, match="no such file"):
        inspect_file(tmp_path / "missing.pt")
    assert main.main(["inspect", str(tmp_path / "missing.pt")]) == 1


def test_names_do_not_reach_the_terminal(tmp_path, capsys):
    path = torch_save(tmp_path / "m.pt", {"\x1b[31m": torch.ones(1), "model": {"\x1b": 3}})
    assert "\x1b" not in shown(capsys, path)[1]
