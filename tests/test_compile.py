"""compile=True ends where the plain run ends, to rounding, recorded or not."""

import pytest
import torch
from purify_cases import make_batches, make_model, quick
from recorder import Recorder, stand_in


@pytest.mark.parametrize("graphs", [False, "auto"], ids=["step by step", "replayed"])
def test_compiled(graphs, monkeypatch):
    recorder = stand_in(monkeypatch, Recorder())
    compiled = []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled.append(1) or real(*a, **k))
    runs = [
        quick(make_model(), make_batches(), alpha=0.1, epochs=4, graphs=graphs, compile=on)
        for on in (True, False)
    ]
    assert compiled == [1]
    assert recorder.records == (0 if graphs is False else 2)
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(value, runs[1].model.state_dict()[name], rtol=1e-6, atol=1e-6)
    for one, other in zip(runs[0].history, runs[1].history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert [run.settings["compile"] for run in runs] == [True, False]
