"""The recipes of docs/own-loop.md as people use them: accumulation, DDP, clipping, SAM, EMA.

Each ends where ``purify`` ends on the same batches, or is refused with a remedy that works.
"""

import copy
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from foreign_loop_cases import (
    ALPHA,
    BATCH,
    EPOCHS,
    LR,
    MOMENTUM,
    PER_EPOCH,
    SEED,
    difference,
    loss_by,
    prepare,
    problem,
    purified_state,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fst_fast

PARTS = 4
PAGE = (Path(__file__).parents[2] / "docs" / "own-loop.md").read_text()


@pytest.fixture(scope="module")
def purified():
    return purified_state()


def prepared(model, wrap=lambda model: model):
    """Criterion, optimizer and schedule of a loop that steps SGD as purify does."""
    criterion, optimizer = prepare(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    return criterion, wrap(model), optimizer, schedule


@pytest.mark.parametrize("form", ["features", "logits"])
def test_accumulation(form, purified):
    model, batches = problem()
    criterion, _, optimizer, schedule = prepared(model)
    for _ in range(EPOCHS):
        for images, labels in batches:
            optimizer.zero_grad()
            for x, y in zip(images.chunk(PARTS), labels.chunk(PARTS), strict=True):
                (loss_by(form, criterion, model, x, y) / PARTS).backward()
            optimizer.step()
        schedule.step()
    assert difference(model.state_dict(), purified) <= 1e-5


@pytest.mark.parametrize("form", ["features", "logits"])
def test_clipping(form, purified):
    model, batches = problem()
    criterion, _, optimizer, schedule = prepared(model)
    for _ in range(EPOCHS):
        for images, labels in batches:
            optimizer.zero_grad()
            loss_by(form, criterion, model, images, labels).backward()
            # So wide that nothing is clipped: the recipe must go through it unchanged.
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            optimizer.step()
        schedule.step()
    assert difference(model.state_dict(), purified) <= 1e-5


def test_clipping_that_clips_leaves_the_norm_where_it_was():
    model, batches = problem()
    criterion, _, optimizer, _ = prepared(model)
    for images, labels in batches:
        optimizer.zero_grad()
        loss_by("features", criterion, model, images, labels).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1e-2) > 1e-2
        optimizer.step()
        torch.testing.assert_close(model.classify.weight.detach().norm(), criterion.norm0)


def test_averaged_weights_go_along_and_disturb_nothing(purified):
    model, batches = problem()
    criterion, _, optimizer, schedule = prepared(model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    own = copy.deepcopy(model.state_dict())
    for _ in range(EPOCHS):
        for number, (images, labels) in enumerate(batches):
            optimizer.zero_grad()
            loss_by("features", criterion, model, images, labels).backward()
            optimizer.step()
            averaged.update_parameters(model)
            first = _ == 0 and number == 0
            for key, value in model.state_dict().items():
                own[key] = value.clone() if first else own[key] * 0.5 + value * 0.5
        schedule.step()
    assert difference(model.state_dict(), purified) <= 1e-5
    torch.testing.assert_close(averaged.module.state_dict(), own)


@pytest.mark.parametrize("form", ["features", "logits"])
def test_torch_compile(form, purified):
    model, batches = problem()
    criterion, _, optimizer, schedule = prepared(model)
    body = nn.Sequential(model.conv, model.norm, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(images, labels):
        if form == "logits":
            return criterion.from_logits(model(images), labels)
        return criterion(body(images), labels)

    for _ in range(EPOCHS):
        for images, labels in batches:
            optimizer.zero_grad()
            loss_of(images, labels).backward()
            optimizer.step()
        schedule.step()
    assert difference(model.state_dict(), purified) <= 1e-5


def test_a_model_that_ends_in_softmax_is_tuned_on_its_logits(purified):
    model, batches = problem(softmax=True)
    criterion, _, optimizer, schedule = prepared(model)
    with pytest.warns(UserWarning, match="ends in a softmax: its logarithm is taken"):
        criterion.from_logits(model(batches[0][0]), batches[0][1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(EPOCHS):
            for images, labels in batches:
                optimizer.zero_grad()
                criterion.from_logits(model(images), labels).backward()
                optimizer.step()
            schedule.step()
    assert difference(model.state_dict(), purified) <= 1e-5


def test_a_model_that_ends_in_log_softmax_is_left_as_it_is(purified):
    model, batches = problem()
    criterion, _, optimizer, schedule = prepared(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(EPOCHS):
            for images, labels in batches:
                optimizer.zero_grad()
                criterion.from_logits(model(images).log_softmax(1), labels).backward()
                optimizer.step()
            schedule.step()
    assert difference(model.state_dict(), purified) <= 1e-5


def test_outputs_of_a_sigmoid_are_warned_of_with_a_remedy_that_ends_where_purify_does(purified):
    model, batches = problem()
    criterion, _, optimizer, schedule = prepared(model)
    with pytest.warns(UserWarning, match=r"behind a sigmoid.*; if so, pass torch.logit\("):
        criterion.from_logits(model(batches[0][0]).sigmoid(), batches[0][1])
    for _ in range(EPOCHS):
        for images, labels in batches:
            optimizer.zero_grad()
            outputs = torch.logit(model(images).sigmoid(), 1e-6)
            criterion.from_logits(outputs, labels).backward()
            optimizer.step()
        schedule.step()
    assert difference(model.state_dict(), purified) <= 1e-5


class SAM(torch.optim.Optimizer):
    """The usual form: two calls a step, the second of which steps a base optimizer."""

    def __init__(self, params, rho=0.05, **settings):
        super().__init__(params, {"rho": rho, **settings})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        length = torch.stack([grad.norm() for grad in grads]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad * (group["rho"] / length))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


@pytest.mark.parametrize("form", ["two calls", "step(closure)"])
def test_sam_is_projected_after_its_second_step(form):
    model, batches = problem()
    twin = copy.deepcopy(model)
    runs = []
    for net, attached in ((model, True), (twin, False)):
        criterion = fst_fast.HeadDeviationLoss.from_model(net, ALPHA, head="classify")
        criterion.reinitialize(SEED)
        optimizer = SAM(net.parameters(), lr=LR, momentum=MOMENTUM)
        if attached:
            fst_fast.attach(optimizer, criterion)
        runs.append((net, criterion, optimizer))
    for images, labels in batches:
        for net, criterion, optimizer in runs:

            def closure(net=net, criterion=criterion, images=images, labels=labels):
                criterion(criterion.features_of(net, images), labels).backward()

            optimizer.zero_grad()
            closure()
            if form == "two calls":
                optimizer.first_step(zero_grad=True)
                closure()
                optimizer.second_step(zero_grad=True)
            else:
                optimizer.step(closure)
        # The loop that is not attached, projected by hand, is the expected one.
        norm0 = runs[0][1].norm0
        assert abs(twin.classify.weight.detach().norm() - norm0) > 1e-4
        with torch.no_grad():
            twin.classify.weight.mul_(norm0 / twin.classify.weight.norm())
        torch.testing.assert_close(model.state_dict(), twin.state_dict())
    with pytest.raises(ValueError, match="must not be attached to this optimizer yet"):
        fst_fast.attach(runs[0][2], runs[0][1])
    assert any(key.startswith("fst_fast") for key in runs[0][2].state_dict()["param_groups"][0])


def test_a_sam_without_a_base_is_refused_and_left_as_it_was():
    model, _ = problem()
    optimizer = SAM(model.parameters(), lr=LR)
    del optimizer.base_optimizer
    with pytest.raises(ValueError, match=r"second_step.*; attach to the optimizer that it steps"):
        fst_fast.attach(optimizer, model.classify)
    assert not optimizer._optimizer_step_post_hooks


def test_lookahead_is_refused_leaves_no_hook_and_its_remedy_works():
    lookahead = pytest.importorskip("timm.optim.lookahead", reason="timm is not installed")
    model, batches = problem()
    # So fast that a blend of two heads is visibly shorter than either.
    base = torch.optim.SGD(model.parameters(), lr=2.0)
    optimizer = lookahead.Lookahead(base, k=2)
    criterion = fst_fast.HeadDeviationLoss.from_model(model, ALPHA, head="classify")
    for _ in range(2):
        # The same words again: the first attempt left nothing behind.
        with pytest.raises(ValueError, match=r"got Lookahead, a wrapper .* \(optimizer._base_opt"):
            fst_fast.attach(optimizer, criterion)
    assert not optimizer._optimizer_step_post_hooks
    assert not base._optimizer_step_post_hooks
    handle = fst_fast.attach(optimizer._base_optimizer, criterion)
    moved = []
    for images, labels in batches * 2:
        optimizer.zero_grad()
        criterion(criterion.features_of(model, images), labels).backward()
        optimizer.step()
        moved.append(abs(model.classify.weight.detach().norm() - criterion.norm0).item())
        handle.project()
        torch.testing.assert_close(model.classify.weight.detach().norm(), criterion.norm0)
    assert max(moved) > 1e-4  # without project() the norm would not be held


def test_hooks_are_all_there_or_none():
    class Stubborn(torch.optim.SGD):
        def register_load_state_dict_pre_hook(self, hook, prepend=False):
            raise AttributeError("no such hooks")

    model, _ = problem()
    optimizer = Stubborn(model.parameters(), lr=LR)
    for _ in range(2):
        with pytest.raises(AttributeError, match="no such hooks"):
            fst_fast.attach(optimizer, model.classify)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_post_hooks


class Takes(nn.Module):
    """Takes further arguments, as models of transformers do: their trainer then divides nothing."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixel_values, **ignored):
        return {"logits": self.net(pixel_values)}


@pytest.mark.parametrize("parts", [1, PARTS])
def test_the_hugging_face_recipe_under_accumulation(parts, purified, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, batches = problem()
    criterion, wrapped, optimizer, _ = prepared(model, Takes)
    [recipe] = re.findall(r"^class PurifyingTrainer.*?^```", PAGE, flags=re.M | re.S)
    namespace = {"transformers": transformers, "criterion": criterion}
    exec(recipe.removesuffix("```"), namespace)

    class InOrder(namespace["PurifyingTrainer"]):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * (step // PER_EPOCH) / EPOCHS)) / 2
    )
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH // parts,
        gradient_accumulation_steps=parts,
        max_grad_norm=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = [
        {"pixel_values": image, "labels": label}
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    ]
    trainer = InOrder(wrapped, settings, train_dataset=rows, optimizers=(optimizer, schedule))
    trainer.train()
    assert trainer.state.global_step == EPOCHS * PER_EPOCH
    assert difference(model.state_dict(), purified) <= 1e-5


def ranks(rank, path, form, expected):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=2
    )
    model, batches = problem()
    settings = {"static_graph": True} if form == "static graph" else {}
    wrap = nn.parallel.DistributedDataParallel
    criterion, wrapped, optimizer, schedule = prepared(model, lambda net: wrap(net, **settings))
    if form == "static graph":
        with pytest.raises(ValueError, match=r"DDP without static_graph.*from_logits"):
            criterion.features_of(wrapped, batches[0][0])
    for _ in range(EPOCHS):
        for images, labels in batches:
            optimizer.zero_grad()
            x, y = images.chunk(2)[rank], labels.chunk(2)[rank]
            how = "logits" if form == "static graph" else form
            loss_by(how, criterion, wrapped, x, y).backward()
            optimizer.step()
        schedule.step()
    assert difference(model.state_dict(), expected) <= 1e-5
    torch.distributed.destroy_process_group()
    (path / f"done{rank}").touch()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("form", ["features", "logits", "static graph"])
def test_two_ranks_of_ddp(form, purified, tmp_path):
    torch.multiprocessing.spawn(ranks, args=(tmp_path, form, purified), nprocs=2)
    assert sorted(p.name for p in tmp_path.glob("done*")) == ["done0", "done1"]


def test_ddp_that_looks_for_unused_parameters_is_refused(monkeypatch):
    model, batches = problem()
    criterion, *_ = prepared(model)
    fake = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(fake)
    fake.module, fake.static_graph, fake.find_unused_parameters = model, False, True
    compiled = torch.compile(fake, backend="eager")
    for wrapped in (fake, compiled):
        with pytest.raises(ValueError, match="DDP without find_unused_parameters"):
            criterion.features_of(wrapped, batches[0][0])


@pytest.mark.parametrize("alpha", ["0.1", None, True, float("nan"), -1])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must be a finite number >= 0"):
        fst_fast.HeadDeviationLoss(nn.Linear(4, 3), alpha)


def test_numbers_of_numpy():
    np = pytest.importorskip("numpy")
    criterion = fst_fast.HeadDeviationLoss(nn.Linear(4, 3), np.float32(0.5))
    assert criterion.alpha == 0.5
    criterion.reinitialize(np.int64(3))
    weight = criterion.head.weight.detach().clone()
    criterion.reinitialize(3)
    assert torch.equal(weight, criterion.head.weight)
    for seed in ("0", None, 1.0):
        with pytest.raises(ValueError, match="seed must be an integer or a generator"):
            criterion.reinitialize(seed)
    optimizer = torch.optim.SGD(criterion.head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="norm must be a finite number > 0, got '9'"):
        fst_fast.attach(optimizer, criterion.head, norm="9")
    assert fst_fast.attach(optimizer, criterion.head, norm=np.float32(9)).norm0 == 9
