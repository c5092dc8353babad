"""HeadDeviationLoss.features_of: the head's input from an unchanged model, or a refusal."""

import types

import pytest
import torch
from purify_cases import make_batches, make_model
from test_drop_in import D, K, make_head, make_rows
from torch import nn

from fst_fast import HeadDeviationLoss


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: types.SimpleNamespace(logits=x)])
def test_features_of_runs_a_model_without_its_head(wrap):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, x):
            return wrap(self.body(x))

    model = Model().eval()
    head = model.body[-1]
    criterion = HeadDeviationLoss(head)
    images, labels = make_batches(1)[0]
    features = criterion.features_of(model, images)
    assert torch.equal(features, model.body[:-1](images))
    fused = criterion(features, labels)
    torch.testing.assert_close(fused, criterion.from_logits(model(images), labels))
    assert "forward" not in vars(head)


def test_features_of_a_convolution_that_is_flattened():
    head = nn.Conv2d(D, K, 1)
    model = nn.Sequential(nn.Unflatten(1, (D, 1, 1)), head, nn.Flatten())
    features, _ = make_rows()
    criterion = HeadDeviationLoss(head)
    assert torch.equal(criterion.features_of(model, features), features)


class Cut(nn.Module):
    """Returns its head's input besides using the head: not what the head returned."""

    def __init__(self):
        super().__init__()
        self.head = make_head()

    def forward(self, x):
        self.head(x)
        return x


@pytest.mark.parametrize(
    ("wrap", "head"),
    [
        (lambda head: nn.Sequential(head, nn.Softmax(1)), make_head),
        (lambda head: nn.Sequential(head, nn.ReLU(inplace=True)), make_head),
        (lambda head: lambda x: head(x) + head(x), make_head),
        (lambda head: nn.Linear(D, K), make_head),
    ],
    ids=["softmax", "in-place", "twice", "another-head"],
)
def test_features_of_refuses_models_that_go_on(wrap, head):
    head = head()
    criterion = HeadDeviationLoss(head)
    with pytest.raises(ValueError, match=r"features_of needs a model.*from_logits"):
        criterion.features_of(wrap(head), make_rows()[0])
    assert "forward" not in vars(head)


def test_features_of_refuses_the_heads_input_returned_beside_it():
    model = Cut()
    with pytest.raises(ValueError, match="features_of needs a model"):
        HeadDeviationLoss(model.head).features_of(model, make_rows()[0])


def test_features_of_refuses_hooks_and_cleans_up():
    head = make_head()
    criterion = HeadDeviationLoss(head)
    features, _ = make_rows()
    handle = head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="features_of needs a model"):
        criterion.features_of(nn.Sequential(head), features)
    handle.remove()
    with pytest.raises(RuntimeError):
        criterion.features_of(nn.Sequential(nn.Linear(3, 3), head), features)
    assert "forward" not in vars(head)


def test_features_of_a_compiled_model_is_right_or_refused():
    model = make_model().eval()
    criterion = HeadDeviationLoss(model[-1])
    compiled = torch.compile(model, backend="eager")
    images = make_batches(1)[0][0]
    logits = compiled(images)
    try:
        features = criterion.features_of(compiled, images)
    except ValueError as error:
        assert "torch.compile" in str(error)  # noqa: PT017
    else:
        assert torch.equal(features, model[:-1](images))
    assert torch.equal(compiled(images), logits)


def test_from_model_finds_the_head():
    model = make_model()
    criterion = HeadDeviationLoss.from_model(model, 0.4, example=make_batches(1)[0][0])
    assert criterion.head is model[-1]
    assert criterion.alpha == 0.4
    assert HeadDeviationLoss.from_model(model, head="5", reduction="sum").reduction == "sum"
