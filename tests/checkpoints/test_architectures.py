"""architectures.build: names, the user's code, refusals; nothing is fetched."""

import builtins
import socket
import sys
import textwrap

import pytest
import torch
from torch import nn

from fst_fast.checkpoints import load
from fst_fast.checkpoints.architectures import build


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("build() opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """An importable module of the user's, under a name of this test's own."""
    name = "user_nets_for_tests"
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent("""
            from torch import nn
            def net(num_classes, width=3):
                return nn.Linear(width, num_classes)
            class Zoo:
                net = staticmethod(net)
            def nothing(num_classes):
                return "a string"
            number = 3
        """)
    )
    (tmp_path / "broken_net_for_tests.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def without_timm(monkeypatch):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name == "timm" or name.startswith("timm."):
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


def test_torchvision_comes_first():
    model = build("resnet18", 7)
    assert type(model).__module__ == "torchvision.models.resnet"
    assert model.fc.out_features == 7


def test_timm_is_second():
    pytest.importorskip("timm")
    model = build("vit_tiny_patch16_224", 5, img_size=32, patch_size=8, depth=1)
    assert type(model).__module__.startswith("timm.")
    assert model.head.out_features == 5


def test_library_is_forced():
    pytest.importorskip("timm")
    assert type(build("timm/resnet18", 4)).__module__.startswith("timm.")
    with pytest.raises(ValueError, match="known to torchvision, got 'torchvision/vit_tiny"):
        build("torchvision/vit_tiny_patch16_224", 4)


def test_options_reach_the_builder():
    pytest.importorskip("timm")
    assert build("timm/resnet18", 4, in_chans=1).conv1.weight.shape[1] == 1


def test_default_number_of_classes():
    assert build("squeezenet1_1").classifier[1].out_channels == 1000


def test_a_module_is_returned_as_it_is():
    model = nn.Linear(2, 3)
    assert build(model, 9) is model
    with pytest.raises(ValueError, match=r"options must be absent.*'width'"):
        build(model, 9, width=3)


def test_a_callable_is_called():
    model = build(lambda num_classes, bias: nn.Linear(2, num_classes, bias=bias), 3, bias=False)
    assert model.out_features == 3
    assert model.bias is None


@pytest.mark.parametrize("path", ["net", "Zoo.net"])
def test_user_code(user_module, path):
    model = build(f"{user_module}:{path}", 6, width=2)
    assert (model.in_features, model.out_features) == (2, 6)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":nett", "no 'nett'; near matches: net"),
        (":number", "must name a callable, got int"),
        (":nothing", "must return a torch.nn.Module, got str"),
        (":", "must read 'package.module:callable'"),
    ],
)
def test_user_code_refused(user_module, suffix, message):
    with pytest.raises(ValueError, match=message):
        build(user_module + suffix, 6)


def test_user_module_missing():
    with pytest.raises(ValueError, match=r"importable module.*no_such_module_here.*PYTHONPATH"):
        build("no_such_module_here.nets:net", 6)


def test_user_module_keeps_its_own_import_error(user_module):
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        build("broken_net_for_tests:net", 6)


@pytest.mark.parametrize("name", ["resent18", "ResNet18"])
def test_unknown_name_suggests(name):
    with pytest.raises(ValueError, match=rf"got '{name}'; near matches: .*resnet18"):
        build(name, 10)


@pytest.mark.parametrize(
    "name",
    ["hf-hub:timm/resnet18.a1_in1k", "local-dir:/tmp/x", "hf_hub/resnet18", "", "../resnet18"],
)
def test_hub_names_are_refused(name):
    with pytest.raises(ValueError, match="build: arch must"):
        build(name, 10)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "r3d_18", "fcn_resnet50"])
def test_only_classifiers(name):
    with pytest.raises(ValueError, match="classifier known to"):
        build(f"torchvision/{name}", 10)


@pytest.mark.parametrize("option", ["weights", "pretrained", "checkpoint_path", "weights_backbone"])
@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet18"])
def test_weights_are_never_asked_for(arch, option):
    with pytest.raises(ValueError, match=f"must not ask for weights, got \\['{option}'\\]"):
        build(arch, 10, **{option: "DEFAULT"})


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "10"])
def test_number_of_classes_is_checked(count):
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1"):
        build("resnet18", count)


@pytest.mark.parametrize("arch", [3, None, ["resnet18"]])
def test_other_types_are_refused(arch):
    with pytest.raises(ValueError, match=r"arch must be a name, a callable or a torch.nn.Module"):
        build(arch, 10)


def test_without_timm_it_says_how_to_get_it(without_timm):
    with pytest.raises(ValueError, match=r"timm, which knows many more.*pip install timm"):
        build("vit_tiny_patch16_224", 10)
    with pytest.raises(RuntimeError, match=r"timm must be installed.*pip install timm"):
        build("timm/resnet18", 10)
    assert build("resnet18", 3).fc.out_features == 3


def with_width(num_classes=2, *, width=4):
    return nn.Linear(width, num_classes)


def of_one_size():
    return nn.Linear(4, 2)


def failing(num_classes=2):
    raise KeyError("no such block")


@pytest.mark.parametrize(
    ("arch", "options", "words"),
    [
        ("torchvision/resnet18", {"widht": 16}, "must take the options .*widht=16.* TypeError"),
        ("timm/resnet18", {"widht": 16}, "must take the options .*widht=16.* TypeError"),
        (with_width, {"widht": 16}, "arch 'with_width' must take the options .*widht=16"),
        (with_width, {"width": "16"}, "arch 'with_width' must take the options .*width='16'"),
        (of_one_size, {}, "arch 'of_one_size' must take the options num_classes=3, got TypeError"),
        (failing, {}, "got KeyError: 'no such block'"),
    ],
)
def test_options_that_a_builder_does_not_take_are_told(arch, options, words):
    if isinstance(arch, str):
        pytest.importorskip(arch.partition("/")[0])
    with pytest.raises(ValueError, match=words):
        build(arch, 3, **options)


def test_a_builder_without_a_number_of_classes_loads(tmp_path):
    torch.save(of_one_size().state_dict(), tmp_path / "m.pt")
    assert load(tmp_path / "m.pt", of_one_size).out_features == 2
