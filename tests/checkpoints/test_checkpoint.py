"""checkpoint.load and save: what does not fit is refused, what is saved comes back."""

import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from checkpoint_cases import Net, Tied, equal, names, torch_save
from torch import nn

from fst_fast import checkpoints
from fst_fast.checkpoints import LoadError, check_writable, load, read_state_dict, save
from fst_fast.checkpoints.architectures import build


def test_wrapped_model_takes_a_stripped_file(tmp_path):
    source, target = Net(), nn.ModuleDict({"module": Net()})
    path = torch_save(tmp_path / "m.pt", {f"module.{n}": v for n, v in source.state_dict().items()})
    load(path, target)
    assert equal(target["module"].state_dict(), source.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resnet18_round_trip_is_bit_exact(tmp_path, dtype):
    model = torchvision.models.resnet18(num_classes=10).to(dtype)
    for buffer in model.buffers():
        buffer.copy_(torch.randint(1, 9, buffer.shape))
    path = tmp_path / "model.safetensors"
    save(path, model, {})
    before = torch.get_rng_state()
    loaded = load(path, "resnet18", 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(loaded.state_dict(), model.state_dict())
    assert equal(read_state_dict(path), model.state_dict())
    assert not loaded.training
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    image = torch.ones(1, 3, 32, 32, dtype=dtype)
    assert torch.equal(loaded(image), model.eval()(image))


def test_load_survives_the_file(tmp_path):
    """The model does not map the file: the file may change afterwards."""
    source = Net()
    path = torch_save(tmp_path / "m.pt", source.state_dict())
    loaded = load(path, Net, 3)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert equal(loaded.state_dict(), source.state_dict())


def test_default_device_does_not_matter(tmp_path):
    path = torch_save(tmp_path / "m.pt", Net().state_dict())
    with torch.device("meta"):
        loaded = load(path, Net, 3)
    assert loaded.fc.weight.device.type == "cpu"


@pytest.mark.parametrize("as_module", [True, False])
def test_tied_weights_round_trip(tmp_path, as_module):
    model = Tied()
    path = tmp_path / "m.safetensors"
    save(path, model if as_module else model.state_dict(), {})
    assert set(safetensors.torch.load_file(path)) == set(model.state_dict())
    loaded = load(path, Tied, 3)
    assert loaded.second.weight is loaded.first.weight
    assert equal(loaded.state_dict(), model.state_dict())


def test_tied_names(tmp_path):
    state = Tied().state_dict()
    del state["second.weight"]
    loaded = load(torch_save(tmp_path / "m.pt", state), Tied, 3)
    assert torch.equal(loaded.second.weight, state["first.weight"])
    state["second.weight"] = state["first.weight"] + 1
    with pytest.raises(
        LoadError, match=r"1 unequal though tied \(second.weight and first.weight\)"
    ):
        load(torch_save(tmp_path / "m.pt", state), Tied, 3)


def test_views_of_one_tensor_round_trip(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {"a": base[1:], "b": base[:, ::2], "c": base, "e": base[:0], "f": base[3:]}
    save(tmp_path / "m.safetensors", state, {})
    assert equal(read_state_dict(tmp_path / "m.safetensors"), state)


def test_every_problem_in_one_message(tmp_path):
    state = Net(width=6).state_dict()
    del state["fc.bias"]
    state |= {f"extra{i}": torch.ones(1) for i in range(9)}
    target = Net()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(LoadError) as caught:
        load(torch_save(tmp_path / "m.pt", state), target)
    text = str(caught.value)
    assert "1 missing (fc.bias)" in text
    assert "9 unexpected (extra0, extra1, extra2, ... (9 in all))" in text
    assert "7 of another shape (conv.weight: model [4, 3, 3, 3], file [6, 3, 3, 3]," in text
    assert equal(target.state_dict(), before)


def test_head_hint(tmp_path):
    path = torch_save(tmp_path / "m.pt", Net(43).state_dict())
    with pytest.raises(LoadError, match="the checkpoint has 43 classes; pass num_classes=43"):
        load(path, Net, 10)
    other = torch_save(tmp_path / "n.pt", Net(43, width=5).state_dict())
    with pytest.raises(LoadError, match="check arch= and its options") as caught:
        load(other, Net, 10)
    assert "pass num_classes" not in str(caught.value)


def test_no_head_hint_for_another_layer(tmp_path):
    def arch(num_classes, width=8):
        return nn.ModuleDict({"first": nn.Linear(4, width), "fc": nn.Linear(4, num_classes)})

    with pytest.raises(LoadError, match=r"2 of another shape \(first.weight") as caught:
        load(torch_save(tmp_path / "m.pt", arch(3, width=9).state_dict()), arch, 3)
    assert "pass num_classes" not in str(caught.value)


def test_integers_do_not_become_weights(tmp_path):
    state = Net().state_dict()
    state["fc.weight"] = state["fc.weight"].long()
    with pytest.raises(LoadError, match=r"1 of another kind \(fc.weight: .*float32.*int64"):
        load(torch_save(tmp_path / "m.pt", state), Net, 3)


def test_only_the_batch_count_may_be_missing(tmp_path):
    state = Net().state_dict()
    del state["norm.num_batches_tracked"]
    loaded = load(torch_save(tmp_path / "m.pt", state), Net, 3)
    assert loaded.norm.num_batches_tracked == 0
    del state["norm.running_mean"]
    with pytest.raises(LoadError, match=r"1 missing \(norm.running_mean\)"):
        load(torch_save(tmp_path / "m.pt", state), Net, 3)


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", Net])
@pytest.mark.parametrize("classes", [1, 5, 43])
def test_number_of_classes_is_inferred(tmp_path, arch, classes):
    source = build(arch, classes)
    path = tmp_path / "m.safetensors"
    save(path, source, {})
    assert equal(load(path, arch).state_dict(), source.state_dict())


def test_timm_number_of_classes_is_inferred(tmp_path):
    pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "depth": 1}
    source = build("vit_tiny_patch16_224", 12, **options)
    save(tmp_path / "m.safetensors", source, {})
    loaded = load(tmp_path / "m.safetensors", "vit_tiny_patch16_224", **options)
    assert loaded.head.out_features == 12


@pytest.mark.parametrize("case", ["no head", "other head", "disagree", "fixed"])
def test_number_of_classes_is_asked_for(tmp_path, case):
    state = Net().state_dict()
    if case == "no head":
        del state["fc.weight"], state["fc.bias"]
    if case == "other head":
        state["fc.weight"] = torch.ones(3, 99)
    if case == "disagree":
        state["fc.bias"] = torch.ones(4)
    arch = (lambda num_classes: Net()) if case == "fixed" else Net
    with pytest.raises(ValueError, match="num_classes must be given"):
        load(torch_save(tmp_path / "m.pt", state), arch)


def test_a_forged_bias_does_not_order_a_huge_head(tmp_path):
    state = Net().state_dict() | {"fc.bias": torch.zeros(1_000_000)}
    asked = []

    def spy(num_classes):
        asked.append(num_classes)
        return Net(num_classes)

    with pytest.raises(ValueError, match="num_classes must be given"):
        load(torch_save(tmp_path / "m.pt", state), spy)
    assert max(asked) <= 7


def test_manifest(tmp_path):
    path = tmp_path / "m.safetensors"
    history = [{"loss": math.nan, "best": math.inf, "accuracy": np.float32(0.5)}]
    fields = {
        "history": history,
        "seed": 3,
        "parents": (Path("a"),),
        "settings": {"dtype": torch.bfloat16, "lr": torch.tensor(0.25), "n": np.int64(4)},
    }
    returned = save(path, Net(), fields)
    text = path.with_suffix(".json").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == returned
    assert text == json.dumps(returned, sort_keys=True, indent=2) + "\n"
    assert returned["history"] == [{"loss": None, "best": None, "accuracy": 0.5}]
    assert returned["settings"] == {"dtype": "torch.bfloat16", "lr": 0.25, "n": 4}
    assert returned["parents"] == ["a"]
    assert returned["payload"] == "m.safetensors"
    assert returned["size_bytes"] == path.stat().st_size
    assert returned["sha256"] == checkpoints.sha256(path)
    assert returned["format_version"] == 3
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    # The JSON is a copy of the header, and says more of the file.
    facts = json.loads(metadata["fst_fast"])
    assert facts == {key: returned[key] for key in facts}
    described = {"payload", "size_bytes", "sha256", "manifest_sha256"}
    assert returned.keys() - facts.keys() == described
    assert returned["versions"] == checkpoints.versions()
    assert returned["versions"]["torch"] == torch.__version__
    assert math.isnan(history[0]["loss"])
    assert names(tmp_path) == ["m.json", "m.safetensors"]


def test_mode_is_the_users(tmp_path):
    (tmp_path / "ordinary").write_text("x")
    save(tmp_path / "m.safetensors", Net(), {})
    modes = {stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"sha256": "x"}, r"must leave \['sha256'\]"),
        ({"model": Net()}, r"manifest\['model'\] must be JSON data, got Net"),
        ({"history": [{3: 1}]}, r"manifest\['history'\]\[0\] must have text as keys, got 3"),
        ({"w": torch.ones(2)}, r"manifest\['w'\] must be JSON data, got Tensor"),
    ],
)
def test_bad_fields_write_nothing(tmp_path, fields, word):
    with pytest.raises(ValueError, match=word):
        save(tmp_path / "m.safetensors", Net(), fields)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({}, "got none"),
        ({"w": torch.tensor([math.nan])}, "'w': NaN"),
        ({"w": torch.eye(2).to_sparse()}, "sparse_coo"),
        ({"w": 3}, "'w': a int"),
        ({3: torch.ones(1)}, "not text"),
        ({"w": torch.ones(1, device="meta")}, "without plain storage"),
    ],
)
def test_bad_weights_leave_the_old_files(tmp_path, state, word):
    path = tmp_path / "m.safetensors"
    save(path, Net(), {})
    before = {n: (tmp_path / n).read_bytes() for n in names(tmp_path)}
    with pytest.raises(ValueError, match=word):
        save(path, state, {})
    assert before == {n: (tmp_path / n).read_bytes() for n in names(tmp_path)}


def test_check_writable_leaves_nothing(tmp_path):
    path = tmp_path / "m.safetensors"
    assert check_writable(str(path)) == path
    assert names(tmp_path) == []
    save(path, Net(), {})
    before = path.read_bytes()
    check_writable(path)
    assert path.read_bytes() == before


def test_check_writable_refuses(tmp_path):
    (tmp_path / "dir.safetensors").mkdir()
    (tmp_path / "manifest.json").mkdir()
    (tmp_path / "file").write_text("x")
    for name, word in {
        "m.pt": r"must end in \.safetensors, got .*use '.*m\.safetensors'",
        "dir.safetensors": "got the directory",
        "manifest.safetensors": "got the directory",
        "missing/m.safetensors": "existing directory.*create .*missing first",
        "file/m.safetensors": "existing directory",
    }.items():
        with pytest.raises(ValueError, match=word):
            check_writable(tmp_path / name)
        with pytest.raises(ValueError, match=word):
            save(tmp_path / name, Net(), {})


@pytest.mark.parametrize("number", [1, 13, 28, 30], ids=["EPERM", "EACCES", "ENOSPC", "EROFS"])
def test_check_writable_names_the_reason(tmp_path, monkeypatch, number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(PermissionError, match=f"must be writable.*{os.strerror(number)}"):
        check_writable(tmp_path / "m.safetensors")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="Linux only")
def test_check_writable_on_a_system_that_refuses():
    with pytest.raises(PermissionError, match="choose another directory"):
        check_writable("/proc/m.safetensors")
