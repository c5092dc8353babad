"""fst_auto: the head is turned to a cosine and held there; weights are averaged."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from purify_cases import equal_states, make_batches, make_model, quick
from torch import nn
from torch.nn import functional as F

import fst_fast
from fst_fast import methods
from fst_fast.methods import HeadState
from fst_fast.methods.fst_auto import FSTAuto
from fst_fast.tuning.averaging import WeightAverage, fresh_statistics
from fst_fast.tuning.run_state import RunState

LR, MOMENTUM = 0.05, 0.9


def by_the_book(model, batches, method, epochs, seed):
    """The method by ordinary PyTorch, step by step."""
    model = copy.deepcopy(model)
    head = model[-1]
    w0 = head.weight.detach().clone()
    bound = 1 / math.sqrt(w0.shape[1])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.empty(w0.shape).uniform_(-bound, bound, generator=generator))
        head.bias.copy_(torch.empty(len(w0)).uniform_(-bound, bound, generator=generator))
    backbone = list(model[:-1].parameters())
    body = torch.optim.SGD(backbone, lr=LR, momentum=MOMENTUM)
    top = torch.optim.SGD(head.parameters(), lr=LR, momentum=MOMENTUM)
    kept = []
    for epoch in range(epochs):
        lr = LR * (1 + math.cos(math.pi * epoch / epochs)) / 2
        body.param_groups[0]["lr"], top.param_groups[0]["lr"] = lr, lr * method.head_lr
        alone = epoch < method.head_epochs * epochs
        model.train(not alone)
        for images, labels in batches:
            inner = (head.weight * w0).sum()
            loss = F.cross_entropy(model(images), labels)
            if inner.item() > method.hold * w0.norm().item() ** 2:
                loss = loss + method.alpha * inner
            body.zero_grad()
            top.zero_grad()
            loss.backward()
            if not alone:
                body.step()
            top.step()
            with torch.no_grad():
                head.weight.mul_(w0.norm() / head.weight.norm())
        if epoch >= epochs * (1 - method.average):
            kept.append([p.detach().clone() for p in model.parameters()])
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), zip(*kept, strict=True), strict=True):
            parameter.copy_(torch.stack(values).mean(0))
        head.weight.mul_(w0.norm() / head.weight.norm())
        norm = model[1]
        seen = [model[0](images) for images, _ in batches]
        norm.running_mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
        norm.running_var = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    return model.eval()


class Straight(nn.Sequential):
    """The same model, of which features cannot be tapped: something follows the head."""

    def forward(self, x):
        return super().forward(x) + 0.0


@pytest.mark.parametrize("kind", [nn.Sequential, Straight])
def test_it_is_the_described_method(kind):
    model, batches = make_model(), make_batches(4)
    method = FSTAuto(alpha=0.3, hold=-0.3)
    given = kind(*copy.deepcopy(model))
    result = quick(
        given, batches, method=method, epochs=2, lr=LR, momentum=MOMENTUM, seed=3, head="5"
    )
    expected = by_the_book(model, batches, method, 8, 3)
    for (name, one), other in zip(
        result.model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        if name.endswith("num_batches_tracked"):
            continue
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


def test_the_head_is_turned_no_further_than_the_hold_asks():
    def cosine(hold):
        method = FSTAuto(alpha=0.3, hold=hold, head_lr=1.0)
        result = quick(make_model(), make_batches(4), method=method, epochs=15, lr=0.02)
        return result.head_shift.cosine

    free, held, never = cosine(-1), cosine(-0.3), cosine(1)
    assert free < -0.75
    # The data may pull further than the penalty pushes, but not as far.
    assert free + 0.1 < held < never - 0.1


def test_at_first_the_head_alone_is_trained():
    model = make_model()
    bodies, heads = [], []

    def look(record, tuned):
        bodies.append({k: v.clone() for k, v in tuned[:-1].state_dict().items()})
        heads.append(tuned[-1].weight.clone())

    quick(model, make_batches(), method="fst_auto", epochs=2, callbacks=[look])
    assert len(bodies) == 8
    assert equal_states(bodies[0], model[:-1].state_dict())
    assert equal_states(bodies[1], model[:-1].state_dict())
    assert not equal_states(bodies[2], bodies[1])
    assert not torch.equal(heads[0], heads[1])


def test_auto_is_a_method_of_its_own_and_says_so():
    result = quick(make_model(), make_batches(), method="fst_auto", epochs=1)
    assert result.settings["method"] == "fst_auto"
    assert result.settings["epochs"] == 4
    assert result.settings["hold"] == -0.5
    assert len(result.history) == 4
    same = quick(make_model(), make_batches(), method="fst_auto", epochs=1)
    assert equal_states(result.model.state_dict(), same.model.state_dict())


def test_auto_is_the_default_of_fst_alone():
    arguments = {"epochs": 1, "progress": False, "device": "cpu", "check": False}
    result = fst_fast.purify(make_model(), make_batches(), **arguments)
    assert result.settings["method"] == "trigger_unlearning"
    for method in ("ft", methods.get("fst", alpha=0.1)):
        result = fst_fast.purify(make_model(), make_batches(), method=method, **arguments)
        assert result.settings["method"] in ("ft", "fst")
        assert len(result.history) == 1


def test_flags_modes_and_momentum_are_put_back():
    model = make_model()
    model[1].momentum = 0.3
    model[0].bias.requires_grad_(False)
    result = quick(model, make_batches(), method="fst_auto", epochs=1)
    assert not result.model.training
    assert result.model[1].momentum == 0.3
    assert not result.model[0].bias.requires_grad
    assert result.model[0].weight.requires_grad


@dataclass(frozen=True)
class Own(FSTAuto):
    """Goes by the logits, which takes the ordinary way."""

    def loss(self, logits, labels, head):
        return super().loss(logits, labels, head)


def test_the_fused_loss_holds_as_the_ordinary_one_does():
    settings = {"alpha": 0.4, "hold": -0.3}
    fused, plain = (
        quick(make_model(), make_batches(4), method=kind(**settings), epochs=2, lr=LR)
        for kind in (FSTAuto, Own)
    )
    for one, other in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_pressure_ends_where_the_head_is_held():
    head = nn.Linear(5, 3)
    state = HeadState(head)
    for turned, expected in ((1.0, 1), (-0.4, 1), (-0.6, 0), (-1.0, 0)):
        with torch.no_grad():
            head.weight.copy_(turned * state.weight0)
        state.hold_at(-0.5)
        assert state.pressure.item() == expected
    with torch.no_grad():
        head.weight.copy_(-state.weight0)
    state.weight_scale = torch.tensor(0.3)
    state.hold_at(-0.5)
    assert state.pressure.item() == 1


# Averaging


def test_the_average_is_of_the_last_epochs():
    model = nn.Linear(2, 1)
    average = WeightAverage(model, 0.4, 5, RunState())
    assert average.first == 3
    values = []
    for epoch in range(5):
        with torch.no_grad():
            model.weight.fill_(epoch**2)
        if epoch >= average.first:
            average.add()
            values.append(epoch**2)
    average.put_in()
    assert model.weight.tolist() == [[pytest.approx(sum(values) / 2)] * 2]
    assert WeightAverage(model, 1.0, 3, RunState()).first == 0
    assert WeightAverage(model, 1e-9, 3, RunState()).first == 2


def test_fresh_statistics_are_those_of_what_is_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None))
    model.train()
    model(torch.randn(50, 3))
    batches = [torch.randn(20, 3) * 3 + 1 for _ in range(4)]
    with torch.no_grad(), fresh_statistics(model) as weigh:
        for count, batch in enumerate(batches, start=1):
            weigh(count)
            model(batch)
    means = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)
    assert [m.training for m in model.modules()] == [True] * 4
    assert (model[1].momentum, model[2].momentum) == (0.1, None)
    with fresh_statistics(nn.Linear(2, 2)) as weigh:
        assert weigh is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, r"alpha must be a number >= 0, got -1.0; the default is 0.1"),
        ({"hold": 1.5}, r"hold must be a number in -1..1, got 1.5; the default is -0.5"),
        ({"hold": float("nan")}, r"hold must be a number in -1..1, got nan"),
        ({"head_epochs": 2}, r"head_epochs must be a number in 0..1, got 2"),
        ({"head_lr": float("inf")}, r"head_lr must be a number >= 0, got inf"),
        ({"average": "half"}, r"average must be a number in 0..1, got 'half'"),
    ],
)
def test_wrong_settings_are_refused_in_words(settings, message):
    with pytest.raises(ValueError, match=message):
        methods.get("fst_auto", **settings)
