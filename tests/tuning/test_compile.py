"""compile=True ends where the plain run ends, to rounding, recorded or not."""

import functools

import pytest
import torch
from purify_cases import InPlaceWhenTraining, OnlyWhenTraining, make_batches, make_model, quick
from recorder import Recorder, stand_in
from torch._dynamo.testing import CompileCounterWithBackend

from fst_fast.tuning import step


@pytest.fixture
def fused(monkeypatch):
    """For each call of the head's fused op, whether its features came out of a compiled graph."""
    calls = []
    real = step.head_deviation_loss

    def watched(features, *more, **settings):
        node, names = features.grad_fn, []
        while node is not None:
            names.append(node.name())
            node = node.next_functions[0][0] if node.next_functions else None
        calls.append("CompiledFunctionBackward" in names)
        return real(features, *more, **settings)

    monkeypatch.setattr(step, "head_deviation_loss", watched)
    return calls


@pytest.fixture
def compiled(monkeypatch):
    """Counts what is compiled: traced and taken apart as ever, but run by PyTorch's kernels."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    return counter


def both(make, **settings):
    """Compiled and not, which must end the same, to rounding."""
    settings = {"alpha": 0.1, "epochs": 4, **settings}
    runs = [quick(make(), make_batches(), compile=on, **settings) for on in (True, False)]
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(value, runs[1].model.state_dict()[name], rtol=1e-6, atol=1e-6)
    for one, other in zip(*(run.history for run in runs), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert [run.settings["compile"] for run in runs] == [True, False]


@pytest.mark.parametrize("graphs_on", [False, "auto"], ids=["step by step", "replayed"])
def test_compiled(graphs_on, monkeypatch, fused):
    """By inductor itself; the head is the fused op's."""
    recorder = stand_in(monkeypatch, Recorder())
    both(make_model, graphs=graphs_on)
    assert recorder.records == (0 if graphs_on is False else 2)
    # Under the recorder itself nothing is compiled, as it watches every call.
    assert fused[0]
    assert not fused[-1]


def test_the_backbone_is_one_graph(compiled, fused):
    both(make_model)
    assert compiled.frame_count == 1
    assert any(fused)


def test_a_head_whose_projection_is_deferred(monkeypatch, compiled):
    monkeypatch.setattr(step, "DEFERRED_FROM", 1)
    both(make_model)
    assert compiled.frame_count == 1


@pytest.mark.parametrize("wrap", [OnlyWhenTraining, InPlaceWhenTraining])
def test_a_model_that_does_more_when_training_is_compiled_as_a_whole(wrap, compiled, fused):
    both(lambda: wrap(make_model()))
    assert compiled.frame_count > 0
    assert not fused


def test_features_that_are_computed_once_are_not_compiled(compiled):
    both(make_model, method="lp", alpha=None)
    assert compiled.frame_count == 0
