"""untrusted: nothing in a file is run, and what is no state dict is refused in words."""

import argparse
import math
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_cases import Net, equal, refused, torch_save
from torch import nn

import fst_fast
from fst_fast.checkpoints import LoadError, read_state_dict

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Calls:
    """Pickles as a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from the file ran"


def payloads(canary):
    touch = f"touch {canary}"
    return {
        "os.system": Calls(os.system, touch),
        "exec": Calls(exec, f"open({str(canary)!r}, 'w')"),
        "eval": Calls(eval, f"open({str(canary)!r}, 'w')"),
        "popen": Calls(subprocess.Popen, ["touch", str(canary)]),
        "open": Calls(open, str(canary), "w"),
        "nested getattr": Calls(getattr, Calls(__import__, "os"), "system"),
    }


def test_the_canary_works(tmp_path):
    """Plain pickle does run these payloads: the tests below can fail."""
    canary = tmp_path / "canary"
    for name in ("os.system", "exec", "eval", "open"):
        pickle.loads(pickle.dumps(payloads(canary)[name]))
        assert canary.exists()
        canary.unlink()


@FORMATS
@pytest.mark.parametrize(
    ("name", "place"),
    [(name, "bare") for name in payloads("x")]
    + [("os.system", place) for place in ("in state", "beside state", "optimizer slot")],
)
def test_hostile_pickles_run_nothing(tmp_path, canary, name, place, zipped):
    bad = payloads(canary)[name]
    good = OrderedDict(weight=torch.ones(2, 2))
    content = {
        "bare": bad,
        "in state": OrderedDict(good, extra=bad),
        "beside state": {"state_dict": good, "epoch": bad},
        "optimizer slot": {"model": good, "optimizer": {"state": {0: {"buf": [bad]}}}},
    }[place]
    text = refused(torch_save(tmp_path / "bad.pt", content, zipped), "do not open it")
    assert "weights_only=False" not in text


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".json", ""])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_plain_pickles_of_any_name_run_nothing(tmp_path, canary, suffix, protocol):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(pickle.dumps(payloads(canary)["os.system"], protocol))
    refused(path)


def test_environment_cannot_switch_the_guard_off(tmp_path, canary, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refused(torch_save(tmp_path / "bad.pt", payloads(canary)["os.system"]), "posix.system")


@FORMATS
def test_whole_module_gets_the_conversion(tmp_path, zipped):
    path = torch_save(tmp_path / "whole.pt", Net(), zipped)
    refused(
        path,
        "Net",
        "sandbox",
        f"model = torch.load({str(path)!r}, weights_only=False)",
        "torch.save(model.state_dict(), 'weights.pt')",
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "scripted.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    refused(path, "TorchScript")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "no such file"),
        (b"", "an empty file"),
        (b"garbage " * 99, ""),
        (b"PK\x03\x04" * 9, ""),
    ],
    ids=["missing", "empty", "garbage", "zip magic"],
)
def test_no_model(tmp_path, suffix, content, word):
    path = tmp_path / f"model{suffix}"
    if content is not None:
        path.write_bytes(content)
    refused(path, word)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_truncated(tmp_path, kind, fraction):
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "safetensors":
        safetensors.torch.save_file(Net().state_dict(), path)
    else:
        torch_save(path, Net().state_dict(), kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    refused(path)


def test_directory_and_pipe(tmp_path):
    refused(tmp_path, "a directory")
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "a pipe")


def test_a_flipped_weight_in_a_zip_is_found(tmp_path):
    path = torch_save(tmp_path / "model.pt", {"w": torch.full((64,), 1.5)})
    data = bytearray(path.read_bytes())
    at = data.index(torch.full((64,), 1.5).numpy().tobytes()) + 9
    data[at] ^= 1
    path.write_bytes(data)
    refused(path, "CRC-32")


def test_compressed_zip_is_refused(tmp_path):
    source = torch_save(tmp_path / "plain.pt", {"w": torch.zeros(100_000)})
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    assert bomb.stat().st_size < 10_000
    refused(bomb, "uncompressed records")


HUGE = torch.ones(1).expand(10**6, 10**5)


@FORMATS
@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([torch.ones(1)], "a list"),
        (torch.ones(1), "a Tensor"),
        ({}, "an empty dict"),
        ({"state_dict": {}}, "an empty dict"),
        ({"w": torch.ones(1), "epoch": 3}, "'epoch': a int"),
        ({"state": {}, "param_groups": []}, "'state': a dict"),
        ({0: torch.ones(1)}, "keys that are not text"),
        ({"w": torch.eye(3).to_sparse()}, "sparse_coo"),
        ({"w": torch.eye(3).to_sparse_csr()}, "sparse_csr"),
        ({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "qint8"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"w": torch.ones(2, device="meta")}, "without plain storage"),
        ({"w": torch.tensor([1.0, math.nan])}, "NaN or infinite"),
        ({"w": torch.tensor([1.0, -math.inf], dtype=torch.bfloat16)}, "NaN or infinite"),
        ({"w": HUGE}, "100000000000 elements"),
        ({"net": {"w": torch.ones(1)}, "model": {"w": torch.ones(1)}}, "several: model, net"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_content_that_is_no_state_dict(tmp_path, content, word, zipped):
    refused(torch_save(tmp_path / "model.pt", content, zipped), word)


def test_nan_in_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.tensor([math.nan])}, path)
    refused(path, "'w': NaN")


def test_hostile_names_do_not_reach_the_terminal(tmp_path):
    path = torch_save(tmp_path / "model.pt", {"\x1b[31m" + "x" * 9999: 3})
    assert "\x1b" not in refused(path)


def test_a_dict_that_holds_itself(tmp_path):
    content = {"w": 1}
    content["model"] = content
    refused(torch_save(tmp_path / "model.pt", content))


WRAPPERS = (None, "state_dict", "model", "net", "model_state_dict", "model_state", "netC")
PREFIXES = ("", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.module.")


@pytest.mark.parametrize(
    ("wrapper", "prefix", "zipped"),
    [(wrapper, "module.", True) for wrapper in WRAPPERS]
    + [("model", prefix, False) for prefix in PREFIXES],
)
def test_wrappers_and_prefixes(tmp_path, wrapper, prefix, zipped):
    state = Net().state_dict()
    content = {prefix + name: value for name, value in state.items()}
    if wrapper:
        content = {wrapper: content, "epoch": 3, "lr": 0.1}
    assert equal(read_state_dict(torch_save(tmp_path / "m.pt", content, zipped)), state)


def test_a_prefix_that_only_some_names_carry_stays(tmp_path):
    path = torch_save(tmp_path / "m.pt", {"module.a": torch.ones(1), "b": torch.ones(1)})
    assert set(read_state_dict(path)) == {"module.a", "b"}


def test_transposed_and_empty_tensors_pass(tmp_path):
    state = {"t": torch.arange(6.0).view(2, 3).t(), "e": torch.empty(0, 3)}
    assert equal(read_state_dict(torch_save(tmp_path / "m.pt", state)), state)


def test_parameters_come_as_plain_tensors(tmp_path):
    path = torch_save(tmp_path / "m.pt", {"w": nn.Parameter(torch.ones(2))})
    assert type(read_state_dict(path)["w"]) is torch.Tensor


@FORMATS
def test_files_from_a_gpu_machine(tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
    path = torch_save(tmp_path / "m.pt", {"w": torch.arange(3.0)}, zipped)
    assert b"cuda:1" in path.read_bytes()
    assert equal(read_state_dict(path), {"w": torch.arange(3.0)})


# Checkpoints of others


def test_a_checkpoint_of_timm(tmp_path):
    """As its CheckpointSaver writes it; its own loader takes the averaged weights too."""
    weights = {"conv.weight": torch.zeros(2), "fc.bias": torch.zeros(1)}
    averaged = {name: value + 1 for name, value in weights.items()}
    whole = {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": weights,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{}]},
        "version": 2,
        "args": argparse.Namespace(model="resnet18", lr=0.1, splits=("a", None)),
        "metric": 0.5,
    }
    assert equal(read_state_dict(torch_save(tmp_path / "m.pt", whole)), weights)
    with_ema = whole | {"state_dict_ema": averaged}
    assert equal(read_state_dict(torch_save(tmp_path / "m.pt", with_ema)), averaged)


@pytest.mark.parametrize("name", ["model_ema", "ema", "ema_state_dict", "swa_model"])
def test_averaged_weights_of_another_name_are_not_passed_over(tmp_path, name):
    """Trainers differ in which of the two they load: who saved the file knows."""
    weights = {"conv.weight": torch.zeros(2), "fc.bias": torch.zeros(1)}
    averaged = {key: value + 1 for key, value in weights.items()}
    whole = {"model": weights, name: averaged, "epoch": 3}
    with pytest.raises(
        LoadError, match=rf"one state dict; got several: model, {name}; .*checkpoint\['model'\]"
    ):
        read_state_dict(torch_save(tmp_path / "both.pt", whole))
    nested = {"model": weights, "ema": {"model": averaged, "decay": 0.9}}
    with pytest.raises(LoadError, match="got several: model, ema;"):
        read_state_dict(torch_save(tmp_path / "nested.pt", nested))
    # Without the other ones they are what there is; and nothing is averaged yet in an empty dict.
    alone = torch_save(tmp_path / "alone.pt", {name: averaged, "epoch": 3})
    assert equal(read_state_dict(alone), averaged)
    empty = torch_save(tmp_path / "empty.pt", {"model": weights, name: {}, "schema": {"a": 1}})
    assert equal(read_state_dict(empty), weights)


def test_two_copies_in_one_state_dict_are_told_by_their_prefixes(tmp_path):
    state = torch.nn.Linear(4, 3).state_dict()
    both = {f"{p}{n}": v for p in ("model.", "ema.model.") for n, v in state.items()}
    path = torch_save(tmp_path / "both.pt", both)
    with pytest.raises(LoadError, match=r"weights behind 'model.', 'ema.model.': save those"):
        fst_fast.load(path, torch.nn.Linear(4, 3))


def test_a_checkpoint_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self, lr=0.1):
            super().__init__()
            self.save_hyperparameters()
            self.model = Net()

        def training_step(self, batch, index):
            return self.model.fc(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)

    task = Task()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 4)))
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **dict.fromkeys(off, False)
    )
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    assert equal(read_state_dict(tmp_path / "m.ckpt"), task.model.state_dict())


def test_tensors_that_overlap_are_refused_and_tied_ones_are_not(tmp_path):
    base = torch.arange(6.0)
    tied = {"a": base, "b": base, "half": torch.ones(4)[2:]}
    found = read_state_dict(torch_save(tmp_path / "m.pt", tied))
    assert equal(found, tied)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    apart = {"a": base[:3], "b": base[3:], "c": torch.empty(0)}
    assert equal(read_state_dict(torch_save(tmp_path / "m.pt", apart)), apart)
    refused(torch_save(tmp_path / "m.pt", {"a": base[:4], "b": base[3:]}), "'b' and 'a'")
    refused(torch_save(tmp_path / "m.pt", {"a": base[:1].expand(6)}), "share memory")


def test_layouts_come_back_in_order(tmp_path):
    state = {
        "z": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "a": torch.randn(3, 2).t(),
        "neg": torch._neg_view(torch.ones(3)),
        "bits": torch.tensor([True, False]),
        "half": torch.randn(3).bfloat16(),
    }
    found = read_state_dict(torch_save(tmp_path / "m.pt", state))
    assert list(found) == list(state)
    assert equal(found, state)


# BackdoorBench


def attack_result(weights):
    return {
        "model_name": "preactresnet18",
        "num_classes": 10,
        "model": weights,
        "img_size": (32, 32, 3),
        "acc": np.float64(0.93),
        "clean": np.bool_(True),
        "poison_index": np.arange(5),
        "names": np.array(["a", "b"]),
        "objects": np.array([None, 1.5], dtype=object),
        "bd_train": {"bd_data_container": {"save_path": "record/x", "index": [1, 2]}},
        "clean_data": "cifar10",
    }


@FORMATS
def test_the_weights_of_an_attack_result_are_read_and_its_arrays_left(tmp_path, zipped):
    weights = {"a.weight": torch.randn(3, 2), "a.bias": torch.ones(3)}
    path = tmp_path / "attack_result.pt"
    torch.save(attack_result(weights), path, _use_new_zipfile_serialization=zipped)
    found = read_state_dict(path)
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_old_names_of_numpy_are_known_too(tmp_path):
    path = tmp_path / "attack_result.pt"
    torch.save(attack_result({"w": torch.ones(2)}), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert list(read_state_dict(path)) == ["w"]


def test_an_array_in_the_weights_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.ones(2), "v": np.ones(3)}, path)
    refused(path, "'v': a Ignored")


@FORMATS
def test_an_array_that_claims_to_be_huge_takes_no_memory(tmp_path, zipped):
    class Huge:
        def __reduce__(self):
            return np._core.multiarray._reconstruct, (np.ndarray, (10**15,), b"b")

    path = tmp_path / "weights.pt"
    content = {"model": {"w": torch.ones(2)}, "index": Huge()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert list(read_state_dict(path)) == ["w"]


def test_other_functions_of_numpy_are_refused(tmp_path, canary):
    path = tmp_path / "weights.pt"
    saved = Calls(np.save, str(canary), [1])
    torch.save({"model": {"w": torch.ones(2)}, "index": saved}, path)
    refused(path, "numpy.save")
