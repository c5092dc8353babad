"""A copy of a model without its values is what deepcopy makes of it."""

import torch
from torch import nn

from fst_fast.heads.copies import Stage, copy_of


class Peculiar(nn.Module):
    """Holds what modules hold beside tensors, some of it twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.list, self.of_modules = [1, 2], [self.layer]
        self.same, self.table = self.list, {"a": (1, 2), "b": self.norm}
        self.places, self.cached = {3, 4}, torch.ones(2) * self.layer.bias[0]


class Guarded(nn.Module):
    """Has its own way of being copied."""

    def __deepcopy__(self, memo):
        return type(self)()


def test_a_copy_is_what_deepcopy_makes():
    model = Peculiar()
    meta = torch.device("meta")
    twin, tensors, modules = copy_of(model, Stage((meta,), lambda tensor: meta), grad=False)
    assert twin.of_modules[0] is twin.layer is not model.layer
    assert twin.table["b"] is twin.norm
    assert twin.same is twin.list is not model.list
    assert twin.places == {3, 4}
    assert twin.cached.is_meta
    assert all(p.is_meta and not p.requires_grad for p in twin.parameters())
    assert tensors[id(twin.layer.weight)] is model.layer.weight
    assert modules[id(twin.norm)] is model.norm
    assert {id(m) for m in twin.modules()}.isdisjoint(map(id, model.modules()))
    twin.list.append(3)
    assert model.list == [1, 2]


def test_a_class_is_copied_in_its_own_way():
    model = nn.Sequential(Guarded(), nn.Linear(3, 3))
    model[0].extra = 1
    twin, _, _ = copy_of(model, Stage((), None))
    assert not hasattr(twin[0], "extra")
    assert twin[1].weight.data_ptr() == model[1].weight.data_ptr()
