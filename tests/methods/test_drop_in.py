"""HeadDeviationLoss: the value it has, what it owns, how it travels and what it refuses."""

import copy
import io
import warnings

import pytest
import torch
from check import assert_no_worse_than_torch
from purify_cases import make_model
from torch import nn
from torch.nn import functional as F

import fst_fast
from fst_fast import HeadDeviationLoss

B, D, K = 8, 6, 4
SETTINGS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none"},
    {"class_weight": torch.tensor([0.5, 1.0, 2.0, 3.0]), "ignore_index": 1},
]
IDS = ["plain", "smoothed-sum", "rows", "weighted-ignoring"]


def make_head(dtype=torch.float32, **more):
    """Trained, by its looks: larger than nn.Linear draws it."""
    head = nn.Linear(D, K, **more).to(dtype)
    with torch.no_grad():
        head.weight.mul_(3)
    return head


def make_rows(dtype=torch.float32):
    return torch.randn(B, D).to(dtype).requires_grad_(), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])


def formula(features, labels, weight, bias, weight0, alpha, settings):
    class_weight = settings.get("class_weight")
    cross_entropy = F.cross_entropy(
        F.linear(features, weight, bias),
        labels,
        weight=None if class_weight is None else class_weight.to(features.dtype),
        **{k: v for k, v in settings.items() if k != "class_weight"},
    )
    return cross_entropy + alpha * (weight * weight0).sum()


@pytest.mark.parametrize("form", ["features", "logits"])
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_equals_the_formula_with_all_gradients(settings, form):
    head = make_head(torch.float64)
    criterion = HeadDeviationLoss(head, 0.3, **settings)
    weight0 = head.weight.detach().clone()
    criterion.reinitialize(1)
    features, labels = make_rows(torch.float64)
    leaves = (features, head.weight, head.bias)
    truth = formula(features, labels, head.weight, head.bias, weight0, 0.3, settings)
    wanted = torch.autograd.grad(truth.sum(), leaves)
    if form == "features":
        loss = criterion(features, labels)
    else:
        loss = criterion.from_logits(head(features), labels)
    got = torch.autograd.grad(loss.sum(), leaves)
    torch.testing.assert_close(loss, truth)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert wanted[1].abs().max() > 0.1


@pytest.mark.parametrize("form", ["features", "logits"])
def test_half_weights_are_added_up_in_float32(form):
    head = make_head(torch.bfloat16)
    criterion = HeadDeviationLoss(head, 0.3)
    features, labels = make_rows(torch.bfloat16)
    output = features if form == "features" else head(features)
    loss = (criterion if form == "features" else criterion.from_logits)(output, labels)
    doubles = [t.detach().double() for t in (features, head.weight, head.bias)]
    truth = formula(doubles[0], labels, *doubles[1:], doubles[1], 0.3, {})
    eager = formula(features, labels, head.weight, head.bias, head.weight, 0.3, {})
    assert loss.dtype == torch.float32
    assert_no_worse_than_torch(loss, eager, truth, name=form)


def test_the_head_stays_the_models():
    model = make_model()
    criterion = HeadDeviationLoss(model[-1], class_weight=torch.ones(K))
    assert list(criterion.parameters()) == []
    assert list(criterion.modules()) == [criterion]
    assert sorted(criterion.state_dict()) == ["norm0", "weight0"]
    torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)


def test_weight0_is_frozen_at_construction():
    head = make_head()
    before = head.weight.detach().clone()
    criterion = HeadDeviationLoss(head)
    criterion.reinitialize(3)
    assert not torch.equal(head.weight, before)
    assert torch.equal(criterion.weight0, before)
    torch.testing.assert_close(criterion.norm0, before.norm())


@pytest.mark.parametrize("seed", [5, torch.Generator().manual_seed(5)], ids=["int", "generator"])
def test_reinitialize_draws_the_head_of_purify(seed):
    head, twin = make_head(), nn.Linear(D, K)
    HeadDeviationLoss(head).reinitialize(seed)
    state = fst_fast.methods.HeadState(twin)
    state.reinitialize(torch.Generator().manual_seed(5))
    assert torch.equal(head.weight, twin.weight)
    assert torch.equal(head.bias, twin.bias)


def test_a_fresh_head_is_flagged_when_it_would_become_w0():
    head = nn.Linear(64, 10)
    with pytest.warns(UserWarning, match="freshly initialised.*before re-initialising"):
        HeadDeviationLoss(head).reinitialize(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HeadDeviationLoss(make_head()).reinitialize(0)


def test_a_1x1_convolution_is_a_head():
    head = nn.Conv2d(D, K, 1)
    linear = nn.Linear(D, K)
    with torch.no_grad():
        linear.weight.copy_(head.weight.flatten(1))
        linear.bias.copy_(head.bias)
    features, labels = make_rows()
    criterion = HeadDeviationLoss(head)
    loss = criterion(features.reshape(B, D, 1, 1), labels)
    torch.testing.assert_close(loss, HeadDeviationLoss(linear)(features, labels))
    loss.backward()
    assert head.weight.grad.shape == head.weight.shape
    logits = head(features.reshape(B, D, 1, 1))
    torch.testing.assert_close(criterion.from_logits(logits, labels), loss)
    with pytest.raises(ValueError, match=r"must be \[B, D\].*flatten"):
        criterion(features.reshape(B, D, 1, 1).expand(-1, -1, 2, 2), labels)


def test_state_dict_brings_w0_into_another_process():
    head = make_head()
    criterion = HeadDeviationLoss(head, 0.2)
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    other = HeadDeviationLoss(nn.Linear(D, K), 0.2)
    assert not torch.equal(other.weight0, criterion.weight0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.weight0, criterion.weight0)
    assert torch.equal(other.norm0, criterion.norm0)


@pytest.mark.parametrize("order", ["model-first", "criterion-first"])
def test_deepcopy_keeps_model_and_criterion_together(order):
    model = make_model()
    model[-1] = make_head()
    criterion = HeadDeviationLoss(model[-1])
    criterion(*make_rows())
    if order == "model-first":
        model2, criterion2 = copy.deepcopy((model, criterion))
    else:
        criterion2, model2 = copy.deepcopy((criterion, model))
    assert criterion2.head is model2[-1]
    assert criterion2.head is not model[-1]
    criterion2.reinitialize(0)
    assert not torch.equal(model2[-1].weight, model[-1].weight)
    assert criterion2.weight0.data_ptr() != criterion.weight0.data_ptr()


def test_conversion_rounds_w0_like_the_head_and_nothing_else():
    model = make_model()
    criterion = HeadDeviationLoss(model[-1], 0.1, class_weight=torch.full((K,), 1 / 3))
    exact = criterion.norm0.clone()
    model.bfloat16()
    criterion.to(model[-1].weight)
    assert criterion.weight0.dtype == torch.bfloat16
    assert torch.equal(criterion.norm0, exact)
    assert torch.equal(criterion.class_weight, torch.full((K,), 1 / 3))
    loss = criterion(make_rows(torch.bfloat16)[0], make_rows()[1])
    assert loss.isfinite()
    model.double(), criterion.double()
    assert criterion.norm0.dtype == criterion.alpha_scale.dtype == torch.float64
    assert criterion.alpha_scale.item() == 0.1
    assert criterion(make_rows(torch.float64)[0], make_rows()[1]).dtype == torch.float64


def test_a_criterion_left_behind_is_told():
    head = make_head()
    criterion = HeadDeviationLoss(head)
    head.double()
    with pytest.raises(ValueError, match=r"float64 on cpu like the head.*criterion\.to\(head"):
        criterion(*make_rows(torch.float64))


def test_alpha_may_change_and_may_be_a_tensor():
    head = make_head()
    features, labels = make_rows()
    criterion = HeadDeviationLoss(head, 0.0)
    plain = criterion(features, labels)
    criterion.alpha = 0.5
    assert criterion.alpha == 0.5
    overlap = (head.weight * criterion.weight0).sum()
    torch.testing.assert_close(criterion(features, labels) - plain, 0.5 * overlap)
    schedule = torch.tensor(0.5)
    criterion.alpha = schedule
    schedule.fill_(2.0)
    torch.testing.assert_close(criterion(features, labels) - plain, 2 * overlap)
    criterion.alpha = 1.0
    assert schedule.item() == 2
    torch.testing.assert_close(criterion(features, labels) - plain, overlap)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -0.1, torch.ones(2)], ids=str)
def test_alpha_out_of_range(alpha):
    criterion = HeadDeviationLoss(make_head())
    with pytest.raises(ValueError, match=r"alpha must be a"):
        criterion.alpha = alpha
    assert criterion.alpha == 0.1


def test_last_is_for_logging():
    head = make_head()
    criterion = HeadDeviationLoss(head, 0.2)
    assert criterion.last is None
    features, labels = make_rows()
    loss = criterion(features, labels)
    fused = criterion.last
    criterion.from_logits(head(features), labels)
    assert not any(value.requires_grad for value in (*fused, *criterion.last))
    for one, other in zip(fused, criterion.last, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(fused.loss, loss.detach())
    assert fused.correct == (head(features).argmax(1) == labels).sum()
    criterion.check(labels)


def test_check_names_a_label_that_a_gpu_let_pass():
    criterion = HeadDeviationLoss(make_head())
    features, labels = make_rows()
    criterion(features, labels)
    criterion.last = criterion.last._replace(invalid=torch.tensor(2))
    with pytest.raises(ValueError, match="got 2 in row 2"):
        criterion.check(labels)
    with pytest.raises(ValueError, match="labels must be class indices"):
        criterion(features, labels + 3)


def test_compiles_as_one_graph_that_follows_alpha():
    head = make_head()
    criterion = HeadDeviationLoss(head, 0.1)
    frames = []

    def backend(graph, example):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda f, y: 2 * criterion(f, y), backend=backend, fullgraph=True, dynamic=False
    )
    for alpha in (0.1, 0.2, 0.7):
        criterion.alpha = alpha
        features, labels = make_rows()
        got = torch.autograd.grad(compiled(features, labels), (features, head.weight))
        last = criterion.last
        want = torch.autograd.grad(2 * criterion(features, labels), (features, head.weight))
        for one, other in zip((*got, *last), (*want, *criterion.last), strict=True):
            torch.testing.assert_close(one, other)
        assert not last.loss.requires_grad
    assert len(frames) == 1


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda: None, "head must be a module, got NoneType; use .*find_head"),
        (make_model, "a Linear or 1x1 Conv2d, got Sequential; use .*find_head"),
        (lambda: nn.Conv2d(D, K, 3), "a Linear or 1x1 Conv2d, got Conv2d"),
        (lambda: nn.utils.parametrizations.weight_norm(make_head()), "parametrised"),
        (lambda: nn.LazyLinear(K), "lazy layer; run one batch"),
        (lambda: nn.Linear(D, 1), "K >= 2"),
    ],
    ids=["none", "model", "conv3x3", "weight-norm", "lazy", "one-class"],
)
def test_refuses_what_is_no_head(head, message):
    with pytest.raises(ValueError, match=f"HeadDeviationLoss: head must.*{message}|{message}"):
        HeadDeviationLoss(head())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": float("nan")}, r"alpha must be a finite number >= 0.*got nan"),
        ({"reduction": "average"}, "reduction must be mean, sum or none"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in"),
        ({"class_weight": torch.ones(3)}, r"class_weight must be \[4\]"),
    ],
    ids=["alpha", "reduction", "smoothing", "class-weight"],
)
def test_refuses_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        HeadDeviationLoss(make_head(), **settings)
