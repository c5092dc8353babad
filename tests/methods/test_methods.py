"""Methods: found by name, refused in words, and what each trains."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import fst_fast
from fst_fast import methods
from fst_fast.methods import HeadState


def test_every_method_is_named_as_in_the_table():
    assert methods.available() == tuple(sorted(methods.METHODS))
    assert {"fe", "fst", "fst_auto", "ft", "ft_init", "lp"} <= set(methods.available())
    for name in methods.available():
        method = methods.get(name)
        assert method.name == name
        assert method.settings()["method"] == name


def test_a_new_method_is_one_class_and_one_entry(monkeypatch):
    @dataclass(frozen=True)
    class Noisy(methods.Method):
        name: ClassVar[str] = "noisy"

        scale: float = 2.0

        def loss(self, logits, labels, head):
            return self.scale * super().loss(logits, labels, head)

    monkeypatch.setitem(methods.METHODS, "noisy", Noisy)
    assert "noisy" in methods.available()
    assert methods.get("noisy", scale=3.0).scale == 3.0


def test_auto_is_a_word_of_fst():
    assert methods.get("fst", alpha="auto") == methods.get("trigger_unlearning")
    assert methods.get("ft", alpha="auto") == methods.get("ft")


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="method 'lp' does not take alpha, beta"):
        methods.get("lp", alpha=1.0, beta=2.0)


def test_head_state_keeps_the_original_weight():
    head = nn.Linear(3, 2)
    state = HeadState(head)
    weight = head.weight.detach().clone()
    state.reinitialize(torch.Generator().manual_seed(1))
    assert torch.equal(state.weight0, weight)
    assert state.norm0 == weight.norm()
    assert not torch.equal(head.weight, weight)
    assert head.weight.abs().max() <= 3**-0.5
    assert head.bias.abs().max() <= 3**-0.5


def test_shift_of_an_unmoved_and_a_reversed_head():
    head = nn.Linear(3, 2)
    state = HeadState(head)
    assert state.shift()[0].item() == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        head.weight.neg_().mul_(2)
    cosine, norm = state.shift().tolist()
    assert cosine == pytest.approx(-1, abs=1e-6)
    assert norm == pytest.approx(2 * state.norm0.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "head_moves", "backbone_moves"),
    [
        ("fst", True, True),
        ("ft", True, True),
        ("ft_init", True, True),
        ("fe", False, True),
        ("lp", True, False),
    ],
)
def test_what_moves(name, head_moves, backbone_moves):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    batches = [(torch.randn(6, 1, 4, 4), torch.arange(6) % 3)]
    states = [
        fst_fast.purify(
            model, batches, method=name, epochs=n, progress=False, device="cpu", check=False
        )
        for n in (1, 3)
    ]
    one, three = (result.model.state_dict() for result in states)
    assert torch.equal(one["4.weight"], three["4.weight"]) != head_moves
    for key in ("0.weight", "1.weight", "1.running_mean"):
        assert torch.equal(one[key], three[key]) != backbone_moves, key
    if name == "lp":
        assert torch.equal(model[1].running_mean, three["1.running_mean"])
