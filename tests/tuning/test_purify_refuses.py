"""Bad input to purify ends in one clear error, and leaves the model alone."""

import copy

import pytest
import torch
from purify_cases import (
    CLASSES,
    bad_batch,
    equal_states,
    make_batches,
    make_model,
    quick,
    with_value,
)
from torch import nn

from fst_fast import methods
from fst_fast.heads.find import AmbiguousHeadError


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            {"method": "fstt"},
            r"method must be one of \['.*'fe', 'fst', 'fst_auto', 'ft', 'ft_init', '",
        ),
        ({"method": 3}, "method must be a name"),
        ({"method": "ft", "alpha": 0.1}, "method 'ft' does not take alpha"),
        ({"method": methods.get("fst"), "alpha": 0.1}, "alpha must be left out where method"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"alpha": -1.0}, "alpha must be a finite number"),
        ({"alpha": "atuo"}, r"alpha must be a number, \"auto\" or None, got 'atuo'"),
        ({"graphs": True}, "graphs=True needs a GPU, got the device cpu; leave graphs out"),
        ({"precision": "fp8"}, r"precision must be one of .* got 'fp8'"),
        ({"backend": "cudnn"}, "backend must be one of reference, cpu, triton, cuda"),
        ({"device": "gpu0"}, "device must be one that this machine has, got 'gpu0'"),
        ({"epochs": 0}, "epochs must be an integer >= 1"),
        ({"lr": 0.0}, "lr must be a finite number > 0"),
        ({"lr": float("inf")}, "lr must be a finite number > 0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"head": "nowhere"}, "head"),
        ({"validation": []}, "purify: validation must yield at least one batch"),
    ],
)
def test_wrong_arguments(more, text):
    with pytest.raises(ValueError, match=text):
        quick(make_model(), make_batches(), **more)


def test_unavailable_backend_lists_what_exists():
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run.*available: reference"):
        quick(make_model(), make_batches(), backend="cuda")


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        ([], "loader must yield at least one batch, got none"),
        (5, "loader must be an iterable"),
        (bad_batch(lambda x, y: (x, y + CLASSES)), r"labels in 0\.\.3 .* got [4-7]"),
        (bad_batch(lambda x, y: (x, y - 9)), r"labels in 0\.\.3 .* got -"),
        (bad_batch(lambda x, y: (x, y.float())), r"got torch.float32 \[8\]; pass labels.long"),
        (
            bad_batch(lambda x, y: (x, nn.functional.one_hot(y, CLASSES))),
            r"one-hot or soft labels: pass labels.argmax",
        ),
        (bad_batch(lambda x, y: (x, y[:5])), r"class indices \[8\], one per image, got"),
        (bad_batch(lambda x, y: (x[:, :1], y)), r"model must take the loader's images \[8, 1"),
        (bad_batch(lambda x, y: (x.byte(), y)), "images as a float tensor"),
        (bad_batch(lambda x, y: {"a": x, "y": y}), "got a dict of a, y; adapt it"),
        (
            bad_batch(lambda x, y: (with_value(x, float("nan")), y)),
            r"finite images, got nan .* \[1, 2, 3, 4\]",
        ),
        (bad_batch(lambda x, y: (with_value(x, float("inf")), y)), "finite images, got inf"),
        (bad_batch(lambda x, y: (x.to("meta"), y)), "on cpu or cpu, where the model is, got meta"),
    ],
    ids=lambda value: None if isinstance(value, str) else "loader",
)
def test_bad_batches(loader, text):
    with pytest.raises(ValueError, match=text):
        quick(make_model(), loader)


def test_bad_batch_in_a_later_epoch_keeps_the_inplace_model_usable():
    calls = [0]

    def factory():
        calls[0] += 1
        images, labels = make_batches(1)[0]
        yield (with_value(images, float("nan")) if calls[0] == 4 else images), labels

    model = make_model()
    with pytest.raises(ValueError, match="must yield finite images, got NaN or Inf at epoch 3"):
        quick(model, factory, epochs=4, inplace=True)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_labels_are_checked_before_an_inplace_model_is_touched():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="labels in 0"):
        quick(model, bad_batch(lambda x, y: (x, y + CLASSES)), inplace=True)
    assert equal_states(before, model.state_dict())


def test_bad_models():
    nan, zero, half = make_model(), make_model(), make_model().half()
    with torch.no_grad():
        nan[0].bias[2] = float("nan")
        zero[-1].weight.zero_()
    with pytest.raises(ValueError, match=r"finite weights, got NaN or Inf in 0\.bias"):
        quick(nan, make_batches())
    with pytest.raises(ValueError, match=r"a weight of zeros \(norm 0\)"):
        quick(zero, make_batches())
    with pytest.raises(ValueError, match=r"float32 weights, got .* use model.float"):
        quick(half, make_batches())
    with pytest.raises(ValueError, match=r"got 1|K = 1|at least 2"):
        quick(make_model(classes=1), make_batches())
    two = nn.Module()
    two.a, two.b, two.body = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES), make_model()[:5]
    two.forward = lambda x: two.a(two.body(x)) + two.b(two.body(x))
    with pytest.raises(AmbiguousHeadError, match=r"head="):
        quick(two, make_batches())
