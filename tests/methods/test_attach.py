"""attach: the norm after every step of any optimizer, and what it refuses."""

import copy
import warnings

import pytest
import torch
from attach_cases import LR, norm_of, run_step, sgd, trained_model
from check import assert_norm
from purify_cases import make_batches, make_model
from torch import nn
from torch.nn import functional as F

import fst_fast

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=LR),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=LR, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=LR, max_iter=3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_scales_exactly_after_every_step_and_nothing_else(make):
    model = trained_model()
    twin = copy.deepcopy(model)
    optimizer, free = make(model.parameters()), make(twin.parameters())
    n0 = norm_of(model[-1])
    handle = fst_fast.attach(optimizer, model[-1])
    run_step(model, optimizer)
    run_step(twin, free)
    assert abs(norm_of(twin[-1]) - n0) > 1e-3
    assert_norm(model[-1].weight.detach(), n0, name="after one step")
    expected = twin[-1].weight * (handle.norm0 / twin[-1].weight.norm())
    torch.testing.assert_close(model[-1].weight, expected)
    assert torch.equal(model[-1].bias, twin[-1].bias)
    assert torch.equal(model[0].weight, twin[0].weight)
    for batch in make_batches(3):
        run_step(model, optimizer, batch)
        assert_norm(model[-1].weight.detach(), n0, name="later")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_half_weights_keep_the_norm_to_their_rounding(dtype):
    head = nn.Linear(256, 64).to("cuda" if torch.cuda.is_available() else "cpu", dtype)
    optimizer = torch.optim.SGD(head.parameters(), lr=LR)
    handle = fst_fast.attach(optimizer, head, norm=7.3)
    head.weight.grad = torch.randn_like(head.weight)
    optimizer.step()
    assert handle.norm0.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Rounding errors of the elements average out; a scale rounded to half would show.
    slack = 1e-14 if dtype == torch.float64 else 1e-4
    assert abs(norm_of(head) / 7.3 - 1) < slack


def test_the_criterions_norm_holds_whatever_became_of_the_head():
    model = trained_model()
    n0 = norm_of(model[-1])
    criterion = fst_fast.HeadDeviationLoss(model[-1])
    criterion.reinitialize(0)
    optimizer = sgd(model)
    handle = fst_fast.attach(optimizer, criterion)
    assert handle.norm0 is criterion.norm0
    assert abs(norm_of(model[-1]) - n0) > 0.1  # no projection before the first step
    run_step(model, optimizer)
    assert_norm(model[-1].weight.detach(), n0, name="criterion")


def test_attaching_a_fresh_head_warns():
    model = trained_model()
    fst_fast.HeadDeviationLoss(model[-1]).reinitialize(0)
    with pytest.warns(UserWarning, match=r"freshly initialised.*pass the criterion, or norm="):
        fst_fast.attach(sgd(model), model[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fst_fast.attach(sgd(model), model[-1], norm=2.0)
        fst_fast.attach(sgd(trained := trained_model()), trained[-1])


def test_convolutional_and_frozen_heads():
    head = nn.Conv2d(6, 4, 1)
    head.requires_grad_(False)
    optimizer = torch.optim.SGD(head.parameters(), lr=LR)
    fst_fast.attach(optimizer, head, norm=3.0)
    optimizer.step()
    assert_norm(head.weight, 3.0, name="frozen conv")


def test_zeros_stay_and_nan_stays():
    head = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(head.parameters(), lr=LR)
    fst_fast.attach(optimizer, head, norm=3.0)
    with torch.no_grad():
        head.weight.zero_()
    optimizer.step()
    assert (head.weight == 0).all()
    with torch.no_grad():
        head.weight[1, 1] = torch.nan
    optimizer.step()
    assert head.weight.isnan().any()


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_step_that_the_scaler_skips_projects_nothing(fused):
    model = trained_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    fst_fast.attach(optimizer, model[-1], norm=9.0)
    before = model[-1].weight.detach().clone()
    images, labels = make_batches(1)[0]
    run_step(model, optimizer, (images * torch.inf, labels), scaler)
    assert torch.equal(model[-1].weight, before)
    assert scaler.get_scale() == 2.0**3
    fresh = trained_model()  # the batch-norm statistics are past saving
    model.load_state_dict(fresh.state_dict())
    run_step(model, optimizer, (images, labels), scaler)
    assert_norm(model[-1].weight.detach(), 9.0, name="scaled step")


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4),
    ],
    ids=["lambda", "cosine"],
)
def test_projects_once_per_step_under_schedulers_and_accumulation(schedule, monkeypatch):
    calls = []
    project = fst_fast.methods.projection.project_
    monkeypatch.setattr(
        fst_fast.methods.projection, "project_", lambda *a: (calls.append(1), project(*a))[0]
    )
    model = trained_model()
    optimizer = sgd(model)
    scheduler = schedule(optimizer)
    fst_fast.attach(optimizer, model[-1])
    for index, (images, labels) in enumerate(make_batches(4)):
        (F.cross_entropy(model(images), labels) / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert len(calls) == 2


@pytest.mark.parametrize("whole", [False, True], ids=["optimizer", "whole-step"])
def test_a_compiled_step_projects(whole):
    model = trained_model()
    optimizer = sgd(model)
    fst_fast.attach(optimizer, model[-1], norm=9.0)
    images, labels = make_batches(1)[0]
    if whole:
        step = torch.compile(lambda: optimizer.step(), backend="eager")
    else:
        step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        step()
        assert_norm(model[-1].weight.detach(), 9.0, name="compiled")


def test_a_replaced_weight_is_told():
    model = trained_model()
    optimizer = sgd(model)
    fst_fast.attach(optimizer, model[-1])
    model[-1].weight = nn.Parameter(torch.ones(4, 6))
    with pytest.raises(RuntimeError, match=r"another one since; call remove\(\)"):
        run_step(model, optimizer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_hook_never_waits_and_is_captured():
    head = nn.Linear(256, 64, bias=False).cuda()
    optimizer = torch.optim.SGD(head.parameters(), lr=LR)
    handle = fst_fast.attach(optimizer, head, norm=7.3)
    head.weight.grad = torch.randn_like(head.weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_norm(head.weight.detach(), 7.3, name="eager")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    handle.load_state_dict({"norm0": 2.0})
    graph.replay()
    assert_norm(head.weight.detach(), 2.0, name="replayed")


def test_a_criterion_on_another_device_is_told():
    model = trained_model()
    optimizer = sgd(model)
    criterion = fst_fast.HeadDeviationLoss(model[-1])
    fst_fast.attach(optimizer, criterion)
    criterion.to("meta")
    with pytest.raises(RuntimeError, match=r"on cpu like the head, got meta; use criterion"):
        optimizer.step()


def test_refuses_a_foreign_head_and_names_the_remedy():
    with pytest.raises(ValueError, match=r"optimizer must hold the head's weight \[4, 6\].*build"):
        fst_fast.attach(sgd(make_model()), trained_model()[-1])


def test_refuses_attaching_twice():
    model = trained_model()
    optimizer = sgd(model)
    criterion = fst_fast.HeadDeviationLoss(model[-1])
    fst_fast.attach(optimizer, criterion)
    for head in (criterion, model[-1]):
        with pytest.raises(ValueError, match=r"not be attached.*remove\(\)"):
            fst_fast.attach(optimizer, head)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")], ids=str)
def test_refuses_a_norm_that_cannot_be_held(norm):
    model = trained_model()
    with pytest.raises(ValueError, match=r"norm must be a finite number > 0"):
        fst_fast.attach(sgd(model), model[-1], norm=norm)
    handle = fst_fast.attach(sgd(model), model[-1], norm=2.0)
    with pytest.raises(ValueError, match=r"norm0 in state_dict must be a finite number > 0"):
        handle.load_state_dict({"norm0": torch.tensor(norm)})
    with pytest.raises(ValueError, match="must hold 'norm0'"):
        handle.load_state_dict({})
    assert handle.norm0 == 2


@pytest.mark.parametrize("value", [0.0, float("nan")], ids=str)
def test_refuses_a_head_without_a_norm(value):
    model = make_model()
    with torch.no_grad():
        model[-1].weight.fill_(value)
    for head in (model[-1], fst_fast.HeadDeviationLoss(model[-1])):
        with pytest.raises(ValueError, match=r"must be a finite number > 0.*load the trained head"):
            fst_fast.attach(sgd(model), head)


def test_refuses_both_a_criterion_and_a_norm():
    model = trained_model()
    with pytest.raises(ValueError, match="norm must be None with a criterion"):
        fst_fast.attach(sgd(model), fst_fast.HeadDeviationLoss(model[-1]), norm=1.0)


def test_refuses_what_is_no_optimizer():
    model = trained_model()
    with pytest.raises(ValueError, match=r"must be a torch.optim.Optimizer, got list"):
        fst_fast.attach(list(model.parameters()), model[-1])


def test_refuses_a_parametrised_head_and_a_whole_model():
    model = trained_model()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"got Sequential; use fst_fast.heads.find_head"):
        fst_fast.attach(optimizer, model)
    nn.utils.parametrizations.weight_norm(model[-1])
    with pytest.raises(ValueError, match="parametrised"):
        fst_fast.attach(optimizer, model[-1])
