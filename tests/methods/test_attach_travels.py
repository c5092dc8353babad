"""attach: through checkpoints, copies and processes."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from attach_cases import LR, norm_of, run_step, sgd, trained_model
from check import assert_norm
from purify_cases import make_batches, make_model
from torch import nn

import fst_fast


def test_two_heads_on_one_optimizer_travel_separately():
    heads = [nn.Linear(6, 4), nn.Linear(6, 4)]
    groups = [{"params": list(heads[0].parameters())}, {"params": list(heads[1].parameters())}]
    for make in (lambda: groups, lambda: [p for head in heads for p in head.parameters()]):
        optimizer = torch.optim.SGD(make(), lr=LR)
        handles = [
            fst_fast.attach(optimizer, head, norm=n) for head, n in zip(heads, (2, 5), strict=True)
        ]
        saved = optimizer.state_dict()
        for handle in handles:
            handle.load_state_dict({"norm0": 1.0})
        optimizer.load_state_dict(saved)
        optimizer.step()
        assert_norm(heads[0].weight.detach(), 2, name="first")
        assert_norm(heads[1].weight.detach(), 5, name="second")


def test_remove_leaves_the_optimizer_as_it_was():
    model = trained_model()
    optimizer = sgd(model)
    plain = optimizer.state_dict()["param_groups"]
    with fst_fast.attach(optimizer, model[-1], norm=9.0) as handle:
        run_step(model, optimizer)
        assert_norm(model[-1].weight.detach(), 9.0, name="inside")
        assert optimizer.state_dict()["param_groups"] != plain
    before = norm_of(model[-1])
    run_step(model, optimizer)
    assert norm_of(model[-1]) != pytest.approx(before, rel=1e-6)
    assert optimizer.state_dict()["param_groups"] == plain
    handle.remove()
    fst_fast.attach(optimizer, model[-1])


def through_a_file(*states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("route", ["optimizer", "attach-after-load", "criterion", "handle"])
def test_a_resumed_run_holds_the_old_norm(route):
    model = trained_model()
    n0 = norm_of(model[-1])
    criterion = fst_fast.HeadDeviationLoss(model[-1])
    criterion.reinitialize(0)
    optimizer = sgd(model)
    handle = fst_fast.attach(optimizer, criterion)
    run_step(model, optimizer, make_batches(2)[0])
    saved = through_a_file(
        model.state_dict(), optimizer.state_dict(), criterion.state_dict(), handle.state_dict()
    )
    run_step(model, optimizer, make_batches(2)[1])

    resumed = make_model()  # nothing of the trained head: a wrong W0 and a wrong norm
    criterion2 = fst_fast.HeadDeviationLoss(resumed[-1])
    optimizer2 = sgd(resumed)
    if route == "attach-after-load":
        optimizer2.load_state_dict(saved[1])
    if route == "criterion":
        fst_fast.attach(optimizer2, criterion2)
        criterion2.load_state_dict(saved[2])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle2 = fst_fast.attach(optimizer2, resumed[-1])
        assert "fst_fast" not in str(optimizer2.param_groups)
    resumed.load_state_dict(saved[0])
    if route == "optimizer":
        optimizer2.load_state_dict(saved[1])
    elif route in ("criterion", "handle"):
        for saved_group in saved[1]["param_groups"]:  # as if a consumer had dropped unknown keys
            for key in [key for key in saved_group if key.startswith("fst_fast")]:
                del saved_group[key]
        optimizer2.load_state_dict(saved[1])
        if route == "handle":
            handle2.load_state_dict(saved[3])
    run_step(resumed, optimizer2, make_batches(2)[1])
    assert_norm(resumed[-1].weight.detach(), n0, name=route)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_saved_optimizer_state_is_loadable_without_fst_fast():
    model = trained_model()
    optimizer = sgd(model)
    fst_fast.attach(optimizer, model[-1])
    run_step(model, optimizer)
    (saved,) = through_a_file(optimizer.state_dict())
    assert sorted(saved) == ["param_groups", "state"]
    plain = sgd(model)
    plain.load_state_dict(saved)
    run_step(model, plain)
    unattached = sgd(model)
    optimizer.load_state_dict(unattached.state_dict())  # and the other way round
    assert "fst_fast" not in str(optimizer.param_groups)


def test_distributed_checkpoint_carries_the_norm():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = trained_model()
    optimizer = sgd(model)
    handle = fst_fast.attach(optimizer, model[-1], norm=6.0)
    run_step(model, optimizer)
    saved = get_optimizer_state_dict(model, optimizer)
    handle.load_state_dict({"norm0": 1.0})
    set_optimizer_state_dict(model, optimizer, saved)
    assert handle.norm0 == 6


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_copies_of_an_optimizer_work_and_are_attached_anew(clone):
    model = trained_model()
    optimizer = sgd(model)
    fst_fast.attach(optimizer, model[-1], norm=9.0)
    run_step(model, optimizer)
    before = model[-1].weight.detach().clone()
    model2, optimizer2 = clone((model, optimizer))
    run_step(model2, optimizer2)
    assert abs(norm_of(model2[-1]) - 9) > 1e-4  # a copy has no hooks
    fst_fast.attach(optimizer2, model2[-1], norm=4.0)
    run_step(model2, optimizer2)
    assert_norm(model2[-1].weight.detach(), 4.0, name="copy")
    assert torch.equal(model[-1].weight, before)


def shard(head, mesh):
    from torch.distributed.tensor import distribute_tensor

    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh))


def distributed_worker(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=2
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for kind in ("ddp", "zero"):
        model = trained_model()
        wrapped = nn.parallel.DistributedDataParallel(model)
        n0 = norm_of(model[-1])
        criterion = fst_fast.HeadDeviationLoss(model[-1], 0.1)
        criterion.reinitialize(0)
        if kind == "ddp":
            optimizer = sgd(model)
        else:
            optimizer = ZeroRedundancyOptimizer(
                model.parameters(), optimizer_class=torch.optim.SGD, lr=LR
            )
        fst_fast.attach(optimizer, criterion)
        for images, labels in make_batches(4)[rank::2]:
            optimizer.zero_grad()
            criterion(criterion.features_of(wrapped, images), labels).backward()
            optimizer.step()
        weight = model[-1].weight.detach()
        assert_norm(weight, n0, name=kind)
        others = [torch.empty_like(weight) for _ in range(2)]
        torch.distributed.all_gather(others, weight)
        assert torch.equal(*others)
    model = make_model()
    shard(model[-1], init_device_mesh("cpu", (2,)))
    for call in (
        lambda: fst_fast.attach(sgd(model), model[-1]),
        lambda: fst_fast.HeadDeviationLoss(model[-1]),
    ):
        with pytest.raises(ValueError, match="whole weight, got a part of it, DTensor"):
            call()
    torch.distributed.destroy_process_group()
    (path / f"done{rank}").touch()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_hold_the_same_weight(tmp_path):
    torch.multiprocessing.spawn(distributed_worker, args=(tmp_path,), nprocs=2)
    assert sorted(p.name for p in tmp_path.glob("done*")) == ["done0", "done1"]
