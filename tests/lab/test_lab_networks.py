"""The lab's architectures: published sizes, shapes, heads that are found, refused names."""

import pytest
import torch
from torch import nn

from fst_fast.heads.find import find_head
from fst_fast.lab import models
from fst_fast.lab.models import OWN, network


@pytest.mark.parametrize(
    ("name", "count", "millions"),
    [
        ("resnet18", 11_173_962, 11.17),
        ("preactresnet18", 11_172_170, 11.17),
        ("vgg19-bn", 20_040_522, 20.04),
    ],
)
def test_networks_have_the_published_number_of_parameters(name, count, millions):
    with torch.device("meta"):
        model = network(name).build(10)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == count
    assert round(parameters / 1e6, 2) == millions
    assert find_head(model) is model.head
    assert (model.head.in_features, model.head.out_features) == (512, 10)


def test_vgg19_has_sixteen_convolutions_each_with_batch_norm():
    layers = list(models.vgg19_bn(width=2).features)
    kinds = "".join(
        {"Conv2d": "c", "BatchNorm2d": "b", "ReLU": "r"}.get(type(m).__name__, "p") for m in layers
    )
    assert kinds == "cbr" * 2 + "p" + "cbr" * 2 + "p" + ("cbr" * 4 + "p") * 3
    widths = [m.out_channels for m in layers if isinstance(m, nn.Conv2d)]
    assert widths == [2] * 2 + [4] * 2 + [8] * 4 + [16] * 8


@pytest.mark.parametrize("name", OWN)
def test_own_networks_take_their_images_at_any_width(name):
    model = network(f"{name}:2").build(7).eval()
    for side in (32, 40):
        assert model(torch.rand(2, 3, side, side)).shape == (2, 7)
    assert find_head(model) is model.head
    wide, narrow = (
        sum(p.numel() for p in network(f"{name}:{w}").build(7).parameters()) for w in (4, 2)
    )
    assert narrow < wide


def test_a_preactivated_block_adds_its_input():
    block = models.PreActBlock(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)
    # A projection sees the activated input, so that a negative one gives nothing.
    block = models.PreActBlock(4, 8, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(-torch.rand(2, 4, 6, 6)), torch.zeros(2, 8, 3, 3))


def test_the_libraries_networks_are_taken_by_name():
    model = network("torchvision/squeezenet1_1").build(5)
    assert type(model).__module__.startswith("torchvision.")
    assert network("resnet18:16").arguments == (
        "--arch fst_fast.lab.models:resnet18 --arch-option width=16"
    )
    assert network("torchvision/resnet18").arguments == "--arch torchvision/resnet18"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18:0", "whole number of 1 or more as its width, got 'resnet18:0'"),
        ("resnet18:x", "write resnet18:16"),
        ("resnet18:1e3", "whole number"),
        ("resnet18:", "whole number"),
        ("os:system", "arch must be one of resnet8, resnet18, preactresnet18, vgg19-bn"),
        ("hf-hub:someone/model", "arch must be one of"),
    ],
)
def test_names_that_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        network(name)


def test_a_name_that_no_library_knows_is_refused_in_building():
    with pytest.raises(ValueError, match=r"near matches: .*vgg19_bn"):
        network("torchvision/vgg19_bm").build(10)
