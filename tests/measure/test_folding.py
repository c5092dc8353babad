"""Folded models give the same logits, and models that cannot be folded are left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fst_fast.lab.models import resnet18
from fst_fast.measure.fold_batchnorm import cast_once, folded

IMAGES = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def used(model):
    """Batch-norm statistics that are neither 0 nor 1, and weights of both signs."""
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            with torch.no_grad():
                module.weight.normal_(generator=generator)
                module.bias.normal_(generator=generator)
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def norms_run(model, images=IMAGES):
    """How many batch-norm layers a forward pass goes through."""
    calls = []
    hooks = [
        m.register_forward_hook(lambda *_: calls.append(1))
        for m in model.modules()
        if isinstance(m, _BatchNorm)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return len(calls)


class Sequence(nn.Module):
    """conv, batch norm, linear, batch norm; ``kind`` adds what must not be folded."""

    def __init__(self, kind="plain"):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=kind != "no bias")
        self.norm = nn.BatchNorm2d(4, track_running_stats=kind != "batch statistics")
        self.again = nn.BatchNorm2d(4)
        self.middle = nn.Linear(4, 5)
        self.middle_norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 2)
        self.seen = None

    def forward(self, x):
        if self.kind == "control flow" and x.sum() > 1e9:
            return x
        y = self.conv(x)
        x = self.norm(y)
        if self.kind == "residual":
            x = x + y
        if self.kind == "shared":
            x = x + self.again(self.conv(x[:, :3]))
        if self.kind == "keeps":
            self.seen = x
        return self.head(self.middle_norm(self.middle(x.relu().mean((2, 3)))))


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("plain", 0),
        ("no bias", 0),
        ("keeps", 0),
        ("residual", 1),
        ("shared", 2),
        ("control flow", 2),
    ],
)
def test_logits_stay(kind, left):
    model = used(Sequence(kind))
    before = copy.deepcopy(model.state_dict())
    out = folded(model, IMAGES)
    torch.testing.assert_close(out(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    assert norms_run(out) == left
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert norms_run(model) == (3 if kind == "shared" else 2)


def test_a_model_that_keeps_what_it_computes_gets_no_proxy():
    model = used(Sequence("keeps"))
    folded(model, IMAGES)
    assert type(model.seen) is torch.Tensor


def test_batch_statistics_are_not_folded():
    model = Sequence("batch statistics").eval()
    out = folded(model, IMAGES)
    assert norms_run(out) == 1
    torch.testing.assert_close(out(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_whole_network_and_its_shared_weights():
    model = used(resnet18(10, 8))
    out = folded(model, IMAGES)
    assert norms_run(model) == 20
    assert norms_run(out) == 0
    torch.testing.assert_close(out(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-4)
    assert out.get_parameter("head.weight") is model.get_parameter("head.weight")


def test_hooks_are_kept_by_leaving_the_model_alone():
    model = used(Sequence())
    calls = []
    model.conv.register_forward_hook(lambda *_: calls.append(1))
    assert folded(model, IMAGES) is model
    assert not calls


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models_are_left_alone(wrap):
    model = wrap(used(Sequence()))
    assert folded(model, IMAGES) is model


def test_a_model_without_batch_norm_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 2)).eval()
    assert folded(model, IMAGES) is model


def test_a_difference_is_noticed(monkeypatch):
    model = used(Sequence())
    wrong = {nn.Conv2d: lambda conv, norm: copy.deepcopy(conv)}
    monkeypatch.setattr("fst_fast.measure.fold_batchnorm._FOLDS", wrong)
    assert folded(model, IMAGES) is model
    monkeypatch.undo()
    assert folded(model, IMAGES) is not model


def test_not_a_number_is_a_difference():
    model = used(Sequence())
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    assert folded(model, IMAGES) is model


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_cast_once_give_the_same_bits(dtype, layout):
    model = used(resnet18(10, 8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = IMAGES.contiguous(memory_format=layout)
    plain, cast = folded(model, images), folded(model, images)
    cast_once(cast, dtype, layout)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(cast(images), plain(images))
    kinds = {p.dtype for p in cast.parameters() if p.ndim > 1}
    assert kinds == {dtype}
    assert all(p.is_contiguous(memory_format=layout) for p in cast.parameters() if p.ndim == 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype


class Reading(nn.Module):
    """Uses the head's weight a second time, where autocast would not cast it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.head(x) * self.head.weight.sum()


def test_a_weight_that_is_read_elsewhere_is_not_cast():
    model = used(Reading())
    out = folded(model, IMAGES)
    assert out is not model
    cast_once(out, torch.bfloat16, torch.contiguous_format)
    assert out.get_parameter("head.weight") is model.head.weight
    assert out.get_parameter("conv.weight").dtype == torch.bfloat16


def test_weights_in_double_are_not_cast():
    model = used(Sequence()).double()
    out = folded(model, IMAGES.double())
    cast_once(out, torch.bfloat16, torch.contiguous_format)
    assert {p.dtype for p in out.parameters()} == {torch.float64}
