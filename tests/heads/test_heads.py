"""find_head names the layer that makes the logits, and leaves the model as it was."""

import functools
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torchvision
from heads_cases import Net, refusal, scaled, two_heads
from torch import nn

from fst_fast.heads.find import find_head, head_matrix, head_name, head_shape, logits_of, unwrap


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))


def flat_mlp():
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10))


def cifar_cnn():
    layers = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(400, 20), nn.ReLU(), nn.Linear(20, 10))


def lenet():
    layers = [nn.Conv2d(1, 6, 5), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 20), nn.ReLU(), nn.Linear(20, 10))


def conv_head():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Conv2d(8, 10, 1))


def dense_conv_head():
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Softmax(1))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (mlp, "3"),
        (flat_mlp, "2"),
        (cifar_cnn, "8"),
        (lenet, "7"),
        (conv_head, "4"),
        (dense_conv_head, "1"),
        (functools.partial(nn.Linear, 12, 5), ""),
        (Net, "zzz"),
    ],
    ids=["mlp", "flat_mlp", "cifar", "lenet", "conv", "dense_conv", "linear", "names_lie"],
)
def test_plain_modules(make, name):
    model = make()
    assert find_head(model) is model.get_submodule(name)
    assert head_name(model, find_head(model)) == name


TORCHVISION = {
    "resnet18": "fc",
    "squeezenet1_0": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "vgg11": "classifier.6",
    "densenet121": "classifier",
    "vit_b_16": "heads.head",
    "swin_t": "head",
    "convnext_tiny": "classifier.2",
    "googlenet": "fc",
    "inception_v3": "fc",
    "shufflenet_v2_x0_5": "fc",
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    aux = {"aux_logits": True, "init_weights": False}
    with torch.device("meta"):
        extra = aux if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **extra).train()
    assert find_head(model) is model.get_submodule(TORCHVISION[name])
    assert model.training


TIMM = {
    "resnet18": "fc",
    "vit_tiny_patch16_224": "head",
    "swin_tiny_patch4_window7_224": "head.fc",
    "convnext_atto": "head.fc",
    "efficientnet_b0": "classifier",
    "mobilenetv4_conv_small": "classifier",
    "dpn68": "classifier",  # 1x1 conv
    "resnetv2_50": "head.fc",  # 1x1 conv
    "caformer_s18": "head.fc.fc2",
    "efficientvit_b0": "head.classifier.4",
    "xcit_nano_12_p8_224": "head",
    "vgg11": "head.fc",
    "nfnet_f0": "head.fc",
    "resnet50_clip": "head.proj",
    "shvit_s1": "head.l",
    "legacy_seresnet18": "last_linear",
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    assert head_name(model, find_head(model)) == TIMM[name]
    assert head_shape(find_head(model))[0] == 10


def test_timm_conv_head_shape():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("dpn68", num_classes=10)
    assert isinstance(find_head(model), nn.Conv2d)
    assert head_shape(find_head(model)) == (10, 832)


class Box(nn.Module):
    """A wrapper unknown to find_head: its forward is evidence like any other."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_wrapped():
    model = Net()
    compiled = torch.compile(model, backend="eager")
    for wrapped in (
        nn.DataParallel(model),
        compiled,
        nn.DataParallel(compiled),
        torch.compile(nn.DataParallel(model), backend="eager"),
        Box(model),
        Box(compiled),
        nn.Sequential(nn.DataParallel(model), nn.Softmax(1)),
    ):
        assert find_head(wrapped) is model.zzz
    assert unwrap(nn.DataParallel(compiled)) is model
    assert unwrap(model) is model
    assert find_head(nn.DataParallel(compiled), head="zzz") is model.zzz
    assert find_head(nn.DataParallel(model), head="module.zzz") is model.zzz
    assert head_name(nn.DataParallel(model), model.zzz) == "zzz"


def test_compiled_parts():
    model = Net()
    model.compile(backend="eager")
    assert find_head(model) is model.zzz
    # A compiled function is one opaque node of the graph, unless it runs eagerly.
    model = Net(torch.compile(lambda net, x: net.zzz(x), backend="aot_eager"))
    assert find_head(model) is model.zzz


def test_wrapper_for_an_absent_gpu():
    model = Net()
    wrapped = nn.DataParallel(model)
    wrapped.device_ids, wrapped.src_device_obj = [0], torch.device("cuda", 0)
    assert find_head(nn.Sequential(wrapped, nn.Softmax(1))) is model.zzz


def test_train_mode_output_does_not_count():
    model = Net(lambda net, x: (net.zzz(x), x) if net.training else net.zzz(x)).train()
    assert find_head(model) is model.zzz


def test_distributed(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = Net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert find_head(wrapped) is model.zzz
        assert unwrap(torch.compile(wrapped, backend="eager")) is model
    finally:
        torch.distributed.destroy_process_group()


def test_only_the_used_head_of_a_list():
    heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))
    model = Net(lambda net, x: net.heads[1](x), heads=heads)
    assert find_head(model) is heads[1]


def test_masked_logits():
    model = Net(lambda net, x: torch.where(torch.arange(4) < 3, net.zzz(x), -1e9))
    assert find_head(model) is model.zzz


def test_one_head_over_crops_and_positions():
    model = Net(lambda net, x: (net.zzz(x) + net.zzz(x.flip(0))) / 2)
    assert find_head(model) is model.zzz
    model = Net(lambda net, x: net.zzz(torch.stack([x, 2 * x], 1)).mean(1))
    assert find_head(model) is model.zzz


def test_subclass_and_bias_free_head():
    class Named(nn.Linear):
        pass

    model = Net(zzz=Named(8, 4, bias=False))
    assert find_head(model) is model.zzz
    assert type(find_head(model)) is Named


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"logits": logits, "features": logits * 2},
        lambda logits: SimpleNamespace(logits=logits, hidden=None),
        lambda logits: namedtuple("Out", "logits aux")(logits, None),
        lambda logits: (logits,),
        lambda logits: logits[:, :, None, None],
    ],
    ids=["dict", "object", "namedtuple", "one_tuple", "B_K_1_1"],
)
def test_outputs_with_logits(wrap):
    model = Net(lambda net, x: wrap(net.zzz(x)))
    assert find_head(model) is model.zzz


def test_logits_of():
    logits = torch.zeros(2, 3)
    assert logits_of(logits) is logits
    assert logits_of({"logits": logits}) is logits
    assert logits_of(SimpleNamespace(logits=logits)) is logits
    assert logits_of([logits]) is logits
    for wrong in ((logits, logits), {"scores": logits}, None, logits.argmax(1), ((logits,),)):
        with pytest.raises(ValueError, match="logits_of: output must be"):
            logits_of(wrong)


def test_values_may_steer_the_forward():
    model = Net(lambda net, x: net.zzz(x) if x.sum().item() > -1e9 else net.fc(x))
    assert find_head(model) is model.zzz
    refusal(model.to("meta"), "could not run")


def test_odd_input_needs_an_example():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 9 * 11, 4))
    refusal(model, "could not run", "example=")
    images = torch.zeros(5, 3, 11, 13)
    assert find_head(model, example=images) is model[2]
    assert find_head(model, example=(images, torch.zeros(5))) is model[2]


def test_half_precision():
    model = Net().bfloat16()
    assert find_head(model) is model.zzz
    assert find_head(model, example=torch.zeros(2, 3, 8, 8)) is model.zzz


def test_explicit_head():
    model = two_heads(lambda net, x: (net.zzz(x), net.other(x)))
    assert find_head(model, head=model.other) is model.other
    assert find_head(model, head="other") is model.other
    assert find_head(scaled(), head="zzz").out_features == 4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_head_matrix_shares_the_weight(layout):
    conv = nn.Conv2d(6, 4, 1).to(memory_format=layout)
    linear = nn.Linear(6, 4)
    for head in (conv, linear):
        matrix = head_matrix(head)
        assert matrix.shape == head_shape(head) == (4, 6)
        with torch.no_grad():
            matrix[1, 2] = 42.0
        assert head.weight[1, 2].item() == 42.0
        matrix.sum().backward()
        assert torch.equal(head.weight.grad, torch.ones_like(head.weight))
    with pytest.raises(ValueError, match="1x1 Conv2d"):
        head_matrix(nn.Conv2d(3, 4, 3))


def test_head_name_of_a_foreign_module():
    with pytest.raises(ValueError, match="must be a module of the model"):
        head_name(Net(), nn.Linear(8, 4))
