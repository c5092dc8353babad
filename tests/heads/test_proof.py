"""The proof of a head from shapes alone: where it holds, where it must not, and that it is fast."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from heads_cases import Net, scaled
from torch import nn

from fst_fast.heads import AmbiguousHeadError, find_head
from fst_fast.heads.evidence import is_pointwise
from fst_fast.heads.proof import proves
from fst_fast.lab.models import resnet18


def last_first(make=lambda net, x: net.head(x), classes=4, **modules):
    """A Net whose head is registered last, where the proof looks for it."""
    return Net(make, **modules, head=nn.Linear(8, classes))


def conv_last(after):
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 1), *after)


def proven(model, example=None):
    last = [module for module in model.modules() if is_pointwise(module)][-1]
    return proves(model, last, example)


class Mixed(nn.Module):
    """Takes every way around the functions whose shapes are known: names, in-place, sums."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2))
        self.norm, self.layer = nn.BatchNorm2d(8), nn.LayerNorm(8)
        self.query = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = F.hardtanh(F.relu6(x), -1.0, 1.0, True)
        x = F.hardswish(x + x * x).flatten(2).transpose(1, 2)
        x = F.gelu(self.layer(F.linear(input=x, weight=self.query.weight, bias=self.query.bias)))
        x = F.scaled_dot_product_attention(x, x, x)
        return self.head(torch.relu(x).mean(1))


PROVEN = {
    "resnet": lambda: resnet18(num_classes=10, width=4),
    "mixed": Mixed,
    "the model itself": lambda: nn.Linear(12, 5),
    "conv, as it is": lambda: conv_last([]),
    "conv, flattened": lambda: conv_last([nn.Flatten()]),
    "tokens": lambda: last_first(lambda net, x: net.head(x[:, None])[:, 0]),
    "mapping": lambda: last_first(lambda net, x: {"logits": net.head(x), "features": x}),
    "no bias": lambda: Net(head=nn.Linear(8, 4, bias=False), make=lambda net, x: net.head(x)),
    "input of 28": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 4)),
    "two classes": lambda: last_first(classes=2),
}


@pytest.mark.parametrize("name", PROVEN)
def test_the_common_case_is_proven(name):
    model = PROVEN[name]()
    assert proven(model)
    assert find_head(model) is [m for m in model.modules() if is_pointwise(m)][-1]


def changed(change):
    def make(net, x):
        logits = net.head(x)
        found = change(logits)
        return logits if found is None else found

    return lambda: last_first(make)


def alias(read):
    """The head's weight is read through a list of the model's own."""

    def make(net, x):
        with torch.no_grad():
            x = x * read(net.kept[0])
        return net.head(x)

    model = last_first(make)
    model.kept = [model.head.weight]
    return model


def tied_last():
    model = last_first()
    model.zzz.weight = model.head.weight
    return model


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Convolved(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


def own_forward():
    model = last_first()
    plain = model.head.forward
    model.head.forward = lambda x: 2 * plain(x)
    return model


def hooked():
    model = last_first()
    model.fc.register_forward_hook(lambda module, args, output: None)
    return model


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def inference(net, x):
    with torch.inference_mode():
        return net.head(x)


NOT_PROVEN = {
    "softmax": changed(lambda z: z.softmax(1)),
    "ReLU": changed(F.relu),
    "batch norm": changed(lambda z: F.batch_norm(z, torch.zeros(4), torch.ones(4))),
    "sum with itself": changed(lambda z: z + z),
    "in place": changed(lambda z: z.mul_(2)),
    "in place, ReLU": changed(lambda z: F.relu(z, inplace=True)),
    "in place, one class": changed(lambda z: z[:, 0].zero_()),
    "in place, by index": changed(lambda z: z.__setitem__((0, 0), 1.0)),
    "in place, through .data": changed(lambda z: z.data.mul_(2)),
    "in place, through detach": changed(lambda z: z.detach().mul_(2)),
    "in place, as a result": changed(lambda z: torch.add(torch.ones(4), 1.0, out=z)),
    "in place, by an operator": changed(torch.ops.aten.relu_.default),
    "some classes": changed(lambda z: z[:, :3]),
    "one class, repeated": changed(lambda z: z[:, :1].expand(-1, 4)),
    "classes in another order": changed(lambda z: z[:, [1, 0, 2, 3]]),
    "classes backwards": changed(lambda z: z.flip(1)),
    "one image, twice": changed(lambda z: z[:1].expand(2, 4)),
    "a custom function": changed(Double.apply),
    "other outputs": changed(lambda z: (z, z)),
    "of two classes, transposed": lambda: last_first(
        lambda net, x: net.head(x).transpose(0, 1), classes=2
    ),
    "of two classes, copied": lambda: last_first(
        lambda net, x: net.head(x).transpose(0, 1).flatten().view(2, 2), classes=2
    ),
    "another head": lambda: last_first(lambda net, x: net.zzz(x)),
    "head twice": lambda: last_first(lambda net, x: net.head(x) * 0 + net.head(x)),
    "head twice, once unused": lambda: last_first(lambda net, x: (net.head(x), net.head(x))[1]),
    "inference mode": lambda: last_first(inference),
    "weight before": lambda: last_first(
        lambda net, x: net.head(x @ net.head.weight.T @ net.head.weight)
    ),
    "weight before, in a list": lambda: alias(lambda weight: weight[0]),
    "its size before": lambda: alias(lambda weight: weight.norm()),
    "pooled after": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "a forward of its class": lambda: Net(lambda net, x: net.head(x), head=Shifted(8, 4)),
    "a call of its class": lambda: Net(lambda net, x: net.head(x), head=Called(8, 4)),
    "a convolution of its class": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), Convolved(3, 4, 1)
    ),
    "a forward of its own": own_forward,
    "a hook": hooked,
    "values steer": lambda: last_first(lambda net, x: net.head(x) if x.sum() > -1e9 else x),
    "scaled": scaled,
}


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_whatever_else_is_left_to_the_search(name):
    assert not proven(NOT_PROVEN[name]())


def test_a_tied_head_is_refused_in_the_words_of_the_search():
    assert proven(tied_last())
    with pytest.raises(AmbiguousHeadError, match="shared by several modules"):
        find_head(tied_last())


@pytest.mark.parametrize("name", ["unchanged", "unread"])
def test_what_is_left_to_the_search_is_so_for_what_it_does(name):
    """The models above differ from these in one thing each."""
    plain = {"unchanged": changed(lambda z: z), "unread": lambda: alias(lambda weight: 1.0)}
    assert proven(plain[name]())


def test_a_head_that_shares_memory_is_refused_although_it_is_proven():
    model = last_first()
    model.register_buffer("kept", model.head.weight.detach())
    assert proven(model)
    with pytest.raises(ValueError, match="shares its weight with 'kept'"):
        find_head(model)


def test_an_example_of_an_odd_size_is_used():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 9 * 11, 4))
    assert not proven(model)
    assert proven(model, torch.zeros(5, 3, 11, 13))


def test_the_model_is_untouched():
    model = last_first(lambda net, x: net.head(net.bn(x)), bn=nn.BatchNorm1d(8)).train()
    model.seen = []
    before, state = vars(model).keys(), copy.deepcopy(model.state_dict())
    assert proven(model)
    assert model.training
    assert vars(model).keys() == before
    assert type(model.head.weight) is nn.Parameter
    assert "forward" not in vars(model.head)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_it_takes_a_fraction_of_the_search(monkeypatch):
    model = resnet18(num_classes=10, width=4)

    def seconds():
        taken = []
        for _ in range(5):
            start = time.process_time()
            find_head(model)
            taken.append(time.process_time() - start)
        return min(taken)

    fast = seconds()
    monkeypatch.setattr("fst_fast.heads.find.proves", lambda *args: False)
    assert fast < seconds() / 2
