"""Batch norm fused with what follows it: in which models, and with which results."""

import copy

import pytest
import torch
from purify_cases import equal_states, make_batches
from torch import nn
from torch.nn import functional as F

import fst_fast
from fst_fast.lab import models
from fst_fast.tuning.fuse_batchnorm import FusedNorm, fuse_batch_norm

IMAGES = torch.rand(4, 3, 8, 8)


class Net(nn.Module):
    """Layers with batch norm between a first convolution and a head."""

    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn, self.other = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)
        self._body = forward

    def forward(self, x):
        return self.head(self._body(self, self.conv(x)).mean((2, 3)))


def added(net, x):
    y = net.bn(x)
    y += net.other(x)
    return net.relu(y)


# What a model does behind its convolution: how many of its layers are fused, with a ReLU, with an
# addition.
BODIES = {
    "F.relu": (lambda net, x: F.relu(net.bn(x)), 1, 1, 0),
    "in place": (lambda net, x: net.relu(net.bn(x)), 1, 1, 0),
    "method": (lambda net, x: net.bn(x).relu_(), 1, 1, 0),
    "two and a sum": (added, 2, 1, 1),
    "sum on the left": (lambda net, x: torch.relu(x + net.bn(x)), 1, 1, 1),
    "sum without relu": (lambda net, x: net.bn(x) + x, 1, 0, 1),
    "alone": (lambda net, x: F.gelu(net.bn(x)), 1, 0, 0),
    "used twice": (lambda net, x: F.relu(y := net.bn(x)) + y, 1, 0, 0),
    "number added": (lambda net, x: F.relu(net.bn(x) + 1), 1, 0, 0),
    "scaled sum": (lambda net, x: F.relu(torch.add(net.bn(x), x, alpha=2)), 1, 0, 0),
    "one before the other": (lambda net, x: F.relu(net.other(F.relu(net.bn(x))) + x), 2, 2, 1),
}


def results(model, run, images):
    """Logits, gradients and the state after a step in train mode."""
    model.train()
    torch.manual_seed(3)
    logits = run(images)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return [logits.detach(), *(g for g in gradients if g is not None)], state


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_fused_model_is_the_model(body, dtype):
    forward, layers, with_relu, with_sum = BODIES[body]
    model = Net(forward).to(dtype)
    before = copy.deepcopy(model.state_dict())
    fused = fuse_batch_norm(model, model.head, IMAGES.to(dtype))
    assert fused.note == f"{layers} layers"
    assert equal_states(model.state_dict(), before)
    norms = [m for m in fused.model.modules() if isinstance(m, FusedNorm)]
    assert sum(norm.relu for norm in norms) == with_relu
    sums = [n for n in fused.model.graph.nodes if "fused" in str(n.target) and len(n.args) == 2]
    assert len(sums) == with_sum
    twin = copy.deepcopy(model)
    expected, state = results(twin, twin, IMAGES.to(dtype))
    got, moved = results(model, fused.model, IMAGES.to(dtype))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for name in state:
        torch.testing.assert_close(moved[name], state[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["resnet18"])
def test_networks_of_the_lab(name):
    make = getattr(models, name, None)
    if make is None:
        pytest.skip(f"the lab has no {name}")
    model = make(num_classes=4, width=8).double()
    head = fst_fast.heads.find_head(model)
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    fused = fuse_batch_norm(model, head, images)
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert fused.note == f"{layers} layers"


def branches(net, x):
    return F.relu(net.bn(x)) if x.sum() > 0 else x


def twice(net, x):
    return net.bn(net.bn(x))


def hooked(model):
    model.bn.register_forward_hook(lambda *_: None)
    return model


UNKNOWN = {
    "a branch on values": (lambda: Net(branches), "none: torch.fx cannot trace the model: TraceE"),
    "a layer that runs twice": (lambda: Net(twice), "none: nothing can be fused: bn"),
    "a hook": (lambda: hooked(Net(BODIES["F.relu"][0])), "none: hooks wait at bn"),
    "no batch norm": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
        "none: the model has",
    ),
    "data parallel": (lambda: nn.DataParallel(Net(added)), "none: the model is compiled or wrap"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_model_is_left_as_it_is(kind):
    make, note = UNKNOWN[kind]
    model = make()
    head = next(m for m in model.modules() if isinstance(m, nn.Linear))
    fused = fuse_batch_norm(model, head, IMAGES)
    assert fused.model is None
    assert fused.note.startswith(note)


def test_a_graph_that_does_something_else_is_not_used():
    class Counts(Net):
        calls = 0

        def forward(self, x):
            # In the graph it is the number that it was when the graph was read.
            Counts.calls += 1
            return super().forward(x) * Counts.calls

    model = Counts(BODIES["F.relu"][0])
    fused = fuse_batch_norm(model, model.head, IMAGES)
    assert fused.model is None
    assert fused.note.startswith("none: the traced model differs by")


def test_a_layer_in_eval_mode_keeps_its_statistics():
    model = Net(added)
    fused = fuse_batch_norm(model, model.head, IMAGES).model
    model.train()
    model.bn.eval()
    before = model.bn.running_mean.clone()
    moving = model.other.running_mean.clone()
    got, expected = fused(IMAGES), copy.deepcopy(model)(IMAGES)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.bn.running_mean, before)
    assert not torch.equal(model.other.running_mean, moving)


def purified(fused_norm, **more):
    torch.manual_seed(0)
    model = models.resnet8(num_classes=4, width=4)
    classes = [type(m) for m in model.modules()]
    fixed = {"alpha": 0.1, "epochs": 3, "lr": 0.02, "progress": False, "check": False}
    fixed |= {"device": "cpu", "precision": "fp32", "channels_last": True, "threads": 1}
    batches = make_batches(3, size=8)
    result = fst_fast.purify(model, batches, **{**fixed, **more}, fused_norm=fused_norm)
    assert [type(m) for m in result.model.modules()] == classes
    assert not any(m._forward_hooks or "forward" in vars(m) for m in result.model.modules())
    return result


@pytest.mark.parametrize("method", ["fst", "ft"])
def test_purify_ends_where_it_ends_without(method):
    alpha = {"alpha": 0.1} if method == "fst" else {"alpha": None}
    off, on = (purified(flag, method=method, **alpha) for flag in (False, True))
    assert off.settings["fused_norm"] is False
    assert on.settings["fused_norm"] == "9 layers"
    assert off.model.state_dict().keys() == on.model.state_dict().keys()
    for name, tensor in off.model.state_dict().items():
        torch.testing.assert_close(on.model.state_dict()[name], tensor, rtol=2e-3, atol=2e-3)
    for ours, theirs in zip(on.history, off.history, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)
