"""find_head leaves the model, its owner and the random state as they were."""

import copy
import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from heads_cases import Net
from torch import nn

from fst_fast.heads.find import find_head


def snapshot(model):
    flags = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    return flags, hooks, grads, torch.get_rng_state().tolist(), sorted(vars(model))


@pytest.mark.parametrize("steered", [False, True], ids=["meta", "real"])
def test_model_is_untouched(steered):
    def make(net, x):
        net.seen = x
        y = F.dropout(net.bn(x), training=True) + torch.rand(8)
        return net.zzz(y) if not steered or x.sum().item() > -1e9 else None

    model = Net(make, bn=nn.BatchNorm1d(8))
    model.fc.eval().requires_grad_(False)
    model.zzz.register_full_backward_hook(lambda *_: None)
    with torch.no_grad():
        model.bn.running_mean.fill_(3.0)
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    assert find_head(model) is model.zzz
    assert snapshot(model) == before
    assert [p.data_ptr() for p in model.parameters()] == pointers
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model.training
    assert not model.fc.training


def test_frozen_model_under_no_grad_and_inference_mode():
    model = Net().requires_grad_(False)
    with torch.no_grad():
        assert find_head(model) is model.zzz
    with torch.inference_mode():
        assert find_head(model) is model.zzz
    assert not any(p.requires_grad for p in model.parameters())


def test_hook_owner_is_not_copied():
    class Trainer:
        calls = 0

        def hook(self, *_):
            self.calls += 1

        def __deepcopy__(self, memo):
            raise AssertionError("the trainer and its data were copied")

    model, trainer = Net(), Trainer()
    model.fc.register_forward_hook(trainer.hook)
    assert find_head(model) is model.zzz
    assert trainer.calls == 1


def test_no_weights_are_allocated():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 1 << 40), nn.Linear(1 << 40, 4))
    assert find_head(model) is model[1]


def test_hooks_that_need_values_get_them():
    model, seen = Net(), []
    model.fc.register_forward_hook(lambda *call: seen.append(call[2].detach().numpy()))
    assert find_head(model) is model.zzz
    assert seen[-1].shape == (2, 8)


def test_a_modules_own_hook_stores_in_the_copy():
    class Storing(Net):
        def store(self, name, *call):
            self.stored = name, call[2]

    model = Storing(lambda net, x: net.zzz(net.stored[1] * 2))
    model.fc.register_forward_hook(functools.partial(model.store, "fc"))
    assert find_head(model) is model.zzz
    assert not hasattr(model, "stored")


def test_no_graph_outlives_the_call():
    model = Net(lambda net, x: net.zzz(x) if x.sum().item() > -1e9 else net.fc(x))
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
        find_head(model)
        assert sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects()) == before
    finally:
        gc.enable()
