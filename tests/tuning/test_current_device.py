"""The public verbs make the GPU that they were given the current one, whichever it was before."""

import contextlib
import importlib

import pytest
import torch
from purify_cases import make_batches, make_model, quick
from torch import nn

import fst_fast

CONTEXTS = importlib.import_module("fst_fast.heads.contexts")
PURIFY = importlib.import_module("fst_fast.tuning.purify")


class Watched(nn.Module):
    """Notes the device that is the current one whenever it runs."""

    def __init__(self, current):
        super().__init__()
        self.net, self.current, self.seen = make_model(), current, []

    def __deepcopy__(self, memo):
        return self

    def forward(self, images):
        self.seen.append(self.current[-1])
        return self.net(images)


@pytest.fixture
def current(monkeypatch):
    """A stand-in for the current GPU; any device may be one."""
    stack = [None]

    @contextlib.contextmanager
    def on_device(device):
        stack.append(device)
        yield
        stack.pop()

    for module in (CONTEXTS, PURIFY):
        monkeypatch.setattr(module, "on_device", on_device)
    return stack


def report(model, batches, tmp_path):
    result = quick(make_model(), batches)
    result.report(tmp_path / "page.html", test=batches, suspect=model, device="cpu")


VERBS = {
    "purify": lambda model, batches, _: quick(model, batches, method="ft", head="net.5"),
    "purify, validated": lambda model, batches, _: quick(
        model, batches, method="ft", head="net.5", validation=batches
    ),
    "evaluate": lambda model, batches, _: fst_fast.evaluate(model, batches, device="cpu"),
    "evaluate, triggered": lambda model, batches, _: fst_fast.evaluate(
        model,
        [(images.sigmoid(), labels) for images, labels in batches],
        fst_fast.triggers.BadNets(size=2),
        device="cpu",
    ),
    "report": report,
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_the_model_runs_where_its_device_is_the_current_one(verb, current, tmp_path):
    model = Watched(current)
    verb(model, make_batches(), tmp_path)
    assert model.seen
    assert set(model.seen) == {torch.device("cpu")}
    assert current == [None]


def test_precision_is_settled_by_the_gpu_that_is_asked_for(monkeypatch):
    stack = [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def device(wanted):
        stack.append(wanted)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: stack[-1].index == 1
    )
    compute = importlib.import_module("fst_fast.data.compute")
    found = [compute.resolve_precision("auto", torch.device("cuda", i)) for i in range(2)]
    assert found == ["fp16", "bf16"]
