"""find_head refuses what it cannot know, and names the candidates and the remedy."""

import pytest
import torch
import torch.nn.functional as F
from heads_cases import Cosine, Net, parametrised, refusal, scaled, tied, two_heads
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fst_fast.heads.find import find_head


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit_tiny_distilled_patch16_224", ("'head'", "'head_dist'")),
        ("crossvit_9_240", ("'head.0'", "'head.1'")),
        ("levit_128s", ("'head.linear'", "'head_dist.linear'")),
        ("volo_d1_224", ("'head'", "'aux_head'")),
    ],
)
def test_timm_with_two_heads_is_refused(name, heads):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    refusal(model, *heads, "2 layers share in the output")


@pytest.mark.parametrize(
    "make",
    [
        lambda net, x: (net.zzz(x) + net.other(x)) / 2,
        lambda net, x: net.zzz(x) + net.other(x).detach(),
        lambda net, x: net.zzz(x) + torch.no_grad()(net.other)(x),
        lambda net, x: net.zzz(x) * net.other(x).sigmoid(),
        lambda net, x: torch.where(x[:, :1] > 0, net.zzz(x), net.other(x)),
        lambda net, x: (net.zzz(x), net.other(x)),
        lambda net, x: {"a": net.zzz(x), "b": net.other(x)},
        lambda net, x: torch.cat([net.zzz(x), net.other(x)], 1),
    ],
    ids=["mean", "detached", "no_grad", "gate", "where", "tuple", "dict", "cat"],
)
def test_two_heads_are_refused(make):
    refusal(two_heads(make), "'zzz' (Linear 8->4)", "'other' (Linear 8->4)")


def transposed():
    return Net(lambda net, x: net.zzz(x), zzz=Transposed(8, 8))


class Transposed(nn.Linear):
    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Net(zzz=Cosine(8, 4)), ("'zzz' (Cosine 8->4)", "computed before it is used")),
        (lambda: parametrised(parametrizations.weight_norm), ("'zzz'", "computed")),
        (lambda: parametrised(parametrizations.spectral_norm), ("'zzz'", "computed")),
        (lambda: parametrised(nn.utils.spectral_norm), ("'zzz'", "computed")),
        (lambda: parametrised(lambda head: prune.random_unstructured(head, "weight", amount=0.5)),
         ("'zzz'", "computed")),
        (lambda: Net(lambda net, x: net.bn(net.zzz(x)), bn=nn.BatchNorm1d(4)), ("BatchNorm",)),
        (lambda: Net(lambda net, x: F.gelu(net.zzz(x))), ("'zzz'", "Gelu")),
        (scaled, ("'zzz'", "parameters act on the output of the last layer: scale")),
        (tied, ("'zzz'", "'other'", "zzz.weight = other.weight")),
        (transposed, ("'zzz' uses its weight transposed",)),
        (lambda: Net(lambda net, x: F.linear(x, net.zzz.weight)), ("without calling 'zzz'",)),
        (lambda: Net(lambda net, x: net.zzz(x)[:, :3]), ("3 classes", "last layer has 4")),
        (lambda: Net(lambda net, x: net.zzz(x @ net.zzz.weight.T @ net.zzz.weight)),
         ("zzz.weight is also used elsewhere",)),
        (lambda: Net(lambda net, x: x @ torch.ones(8, 4)), ("computed before it is used",)),
        (lambda: Net(lambda net, x: net.zzz(x).argmax(1)), ("'zzz'",)),
        (lambda: Net(lambda net, x: net.zzz(x), zzz=nn.Bilinear(8, 8, 4)), ("could not run",)),
    ],
    ids=["cosine", "weight_norm", "spectral_norm", "old_spectral_norm", "pruned", "batch_norm",
         "gelu", "scale", "tied", "transposed", "functional", "sliced", "reused", "constant",
         "argmax", "two_inputs"],
)  # fmt: skip
def test_refusals(make, words):
    refusal(make(), *words)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm_is_refused():
    refusal(parametrised(nn.utils.weight_norm), "'zzz'", "computed")


def test_custom_function_that_hides_its_inside_is_refused():
    def checkpointed(net, x):
        return torch.utils.checkpoint.checkpoint(net.zzz, x, use_reentrant=True)

    refusal(Net(checkpointed), "custom function")


def test_conv3x3_head_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1))
    refusal(model, "'1' (Conv2d 3x3 8->4)", "neither Linear nor a 1x1 Conv2d")


def early_exit(net, x):
    first = net.other(x)
    return first if first.softmax(1).max().item() > 0.99 else net.zzz(x)


def test_early_exits_are_refused():
    refusal(two_heads(early_exit), "values may steer", "'zzz'", "'other' (Linear 8->4)")


def test_foreign_bias_is_refused():
    class Shifted(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.shift)

    model = Net(zzz=Shifted(8, 4))
    model.zzz.shift = nn.Parameter(torch.zeros(4))
    refusal(model, "'zzz' adds something else than its own bias")


def test_inference_mode_inside_is_refused():
    def hidden(net, x):
        with torch.inference_mode():
            second = net.other(x)
        return net.zzz(x) + second

    refusal(two_heads(hidden), "inference_mode inside the forward")


def test_tokens_are_refused_at_the_first_size():
    model, runs = Net(lambda net, x: torch.stack([net.zzz(x)] * 3, 1)), []
    model.register_forward_hook(lambda *call: runs.append(call[2].shape))
    refusal(model, "output [2, 3, 4], not [2, K]")
    assert len(runs) == 1


def test_dense_logits_in_a_dict_are_refused():
    model = Net(lambda net, x: {"logits": torch.stack([net.zzz(x)] * 3, 1)})
    refusal(model, "output dict, not [2, K]")


@pytest.mark.parametrize("example", [torch.zeros(3), {"x": 1}, []], ids=["1d", "dict", "empty"])
def test_example_must_be_a_batch(example):
    refusal(Net(), "example must be a batch", error=ValueError, example=example)


def test_dense_output_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    runs = []
    model.register_forward_hook(lambda *call: runs.append(call[2].shape))
    refusal(model, "'1' (Conv2d 1x1 8->4)", "], not [2, K]")
    assert len(runs) == 6


def test_one_output_is_refused():
    for make in (lambda net, x: net.zzz(x), lambda net, x: net.zzz(x).squeeze(1)):
        refusal(Net(make, classes=1), "K >= 2", "K = 1", "'zzz'", error=ValueError)


def test_no_parameters():
    refusal(nn.Flatten(), "candidates: none")
    refusal(nn.Flatten(), "candidates: none", example=torch.zeros(2, 3))


def test_overlapping_storage_is_refused():
    model = two_heads(lambda net, x: net.zzz(x))
    model.other.weight = nn.Parameter(model.zzz.weight.data)
    refusal(model, "'zzz'", "weight with 'other.weight'", "untie", error=ValueError)
    flat = torch.zeros(64)
    model.zzz.weight, model.other.weight = map(nn.Parameter, flat.view(2, 4, 8))
    assert find_head(model) is model.zzz


def test_lazy_layer_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    refusal(model, "'1' (LazyLinear)", "run one batch", error=ValueError)
    model(torch.zeros(2, 6))
    assert find_head(model) is model[1]


def bias_parametrised():
    return parametrised(lambda head: parametrize.register_parametrization(head, "bias", nn.Tanh()))


def bias_tied():
    model = two_heads(lambda net, x: net.zzz(x))
    model.other.bias = model.zzz.bias
    return model


def integer():
    model = Net()
    weight = torch.zeros(4, 8, dtype=torch.int8)
    model.zzz.weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "head", "words"),
    [
        (Net, nn.Linear(8, 4), ("must be a module of the model", "'zzz' (Linear 8->4)")),
        (Net, "nowhere", ("names no module", "'nowhere'", "'zzz' (Linear 8->4)")),
        (Net, "conv", ("a Linear or 1x1 Conv2d", "'conv' (Conv2d 3x3 3->8)", "'zzz'")),
        (lambda: Net(zzz=nn.Conv2d(8, 4, 1, groups=2)), "zzz", ("groups=1",)),
        (lambda: Net(zzz=nn.Conv2d(8, 4, 1, padding=1)), "zzz", ("no padding",)),
        (lambda: Net(classes=1), "zzz", ("K >= 2", "K = 1")),
        (tied, "zzz", ("weight with 'other.weight'", "untie")),
        (lambda: parametrised(parametrizations.weight_norm), "zzz", ("parametrised",)),
        (lambda: parametrised(nn.utils.spectral_norm), "zzz", ("parametrised",)),
        (bias_parametrised, "zzz", ("parametrised",)),
        (bias_tied, "zzz", ("bias with 'other.bias'", "untie")),
        (integer, "zzz", ("must be floating", "torch.int8")),
    ],
    ids=["foreign", "unknown", "conv3x3", "groups", "padding", "K1", "tied", "new", "old",
         "bias_parametrised", "bias_tied", "int8"],
)  # fmt: skip
def test_explicit_head_is_checked(make, head, words):
    refusal(make(), *words, error=ValueError, head=head)
