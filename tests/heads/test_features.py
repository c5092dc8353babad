"""Features out of unchanged models, and purify on them."""

import pytest
import torch
from purify_cases import (
    InPlaceWhenTraining,
    OnlyWhenTraining,
    equal_states,
    make_batches,
    make_model,
    quick,
)
from torch import nn

from fst_fast import methods
from fst_fast.heads.tap import tap_features

IMAGES = torch.randn(4, 3, 8, 8)


class Wrapped(nn.Module):
    """A backbone, a head, and something after it."""

    def __init__(self, after, conv=False):
        super().__init__()
        pool = [nn.AdaptiveAvgPool2d(1)] if conv else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), *pool)
        self.head = nn.Conv2d(6, 4, 1) if conv else nn.Linear(6, 4)
        self.after = after

    def forward(self, x):
        return self.after(self, self.head(self.backbone(x)))


def twice(model, z):
    return z + model.head(torch.zeros(len(z), 6))


LAST = {
    "plain": Wrapped(lambda m, z: z),
    "mapping": Wrapped(lambda m, z: {"logits": z}),
    "one-tuple": Wrapped(lambda m, z: (z,)),
    "conv, flattened": Wrapped(lambda m, z: z.flatten(1), conv=True),
    "conv, as it is": Wrapped(lambda m, z: z, conv=True),
}
MORE = {
    "softmax": Wrapped(lambda m, z: z.softmax(1)),
    "temperature": Wrapped(lambda m, z: z / 2),
    "in place": Wrapped(lambda m, z: torch.relu_(z.clone())),
    "head twice": Wrapped(twice),
    "some classes": Wrapped(lambda m, z: z[:, :3]),
    "pooled after": Wrapped(lambda m, z: z.mean((2, 3)), conv=True),
    "not called": Wrapped(lambda m, z: m.head(m.backbone(IMAGES[:2]))),
}


@pytest.mark.parametrize("name", LAST)
def test_features_are_the_heads_input(name):
    model = LAST[name].eval()
    tap = tap_features(model, model.head, IMAGES)
    features = tap(IMAGES)
    torch.testing.assert_close(features, model.backbone(IMAGES).flatten(1))
    assert "forward" not in vars(model.head)


@pytest.mark.parametrize("name", MORE)
def test_models_that_do_more_are_left_alone(name):
    model = MORE[name]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert tap_features(model, model.head, IMAGES) is None
    assert equal_states(before, model.state_dict())
    assert model.training
    assert "forward" not in vars(model.head)


@pytest.mark.parametrize("where", ["head", "model", "backbone"])
def test_a_hook_that_sees_the_logits_gets_logits(where):
    model = make_model()
    seen = {"head": model[-1], "model": model, "backbone": model[0]}[where]
    seen.register_forward_hook(lambda module, args, output: None)
    tap = tap_features(model, model[-1], IMAGES)
    assert (tap is None) == (where != "backbone")


def test_a_head_with_a_forward_of_its_own_keeps_it():
    model = make_model()
    mine = model[-1].forward
    model[-1].forward = mine
    assert tap_features(model, model[-1], IMAGES) is not None
    assert vars(model[-1])["forward"] == mine


def test_compiled_models_are_left_alone():
    model = torch.compile(make_model(), backend="eager")
    assert tap_features(model, model._orig_mod[-1], IMAGES) is None


def from_logits(method):
    """The same method through logits: one with its own loss is not run on features."""
    base = type(method)

    class Logits(base):
        name = base.name

        def loss(self, logits, labels, head):
            return super().loss(logits, labels, head)

    return Logits(**{k: v for k, v in method.settings().items() if k != "method"})


# The model's shortcut has no layer that ssft could suppress it in.
@pytest.mark.parametrize("name", sorted({*methods.available()} - {"ssft"}))
def test_purify_is_the_same_from_features_and_from_logits(name):
    method = methods.get(name, project=True)
    fused = quick(make_model(), make_batches(), method=method).model.state_dict()
    plain = quick(make_model(), make_batches(), method=from_logits(method)).model.state_dict()
    for key, tensor in fused.items():
        torch.testing.assert_close(tensor, plain[key], rtol=1e-5, atol=1e-6)


def large_model():
    """A head of more than 2**19 weights, whose projection is deferred."""
    torch.manual_seed(1)
    model = make_model(classes=90000)
    with torch.no_grad():
        model[-1].weight.mul_(3)
    return model


def test_a_deferred_projection_shows_nobody():
    seen = []

    def callback(record, model):
        seen.append((record.norm, model[-1].weight.norm().item()))

    model = large_model()
    norm = model[-1].weight.norm().item()
    method = methods.get("fst", alpha=0.1)
    result = quick(model, make_batches(), method=method, callbacks=[callback])
    plain = quick(model, make_batches(), method=from_logits(method))
    for told, measured in seen:
        assert told == pytest.approx(norm, rel=1e-5)
        assert measured == pytest.approx(norm, rel=1e-5)
    assert len(seen) == 2
    got, expected = result.model[-1].weight, plain.model[-1].weight
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert result.history[-1].loss == pytest.approx(plain.history[-1].loss, rel=1e-5)


@pytest.mark.parametrize("wrap", [OnlyWhenTraining, InPlaceWhenTraining])
def test_a_model_that_does_more_when_training_is_run_the_ordinary_way(wrap):
    method = methods.get("fst", alpha=0.1)
    fused = quick(wrap(large_model()), make_batches(), method=method)
    plain = quick(wrap(large_model()), make_batches(), method=from_logits(method))
    assert equal_states(fused.model.state_dict(), plain.model.state_dict())
