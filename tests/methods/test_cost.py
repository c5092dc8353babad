"""The cost of a step that `fst-fast methods` tells is the one counted in multiplications."""

import pytest
import torch
from purify_cases import quick
from torch.utils.flop_counter import FlopCounterMode

from fst_fast import methods
from fst_fast.lab.models import resnet18

# The searches before an epoch, and the choice of a threshold, are not part of a step.
ALONE = {
    "anp": {},
    "i_bau": {"search_steps": 0},
    "rnp": {"passes": 0},
    "tsbd": {"passes": 0, "most_lost": 0.0},
}
# The generator of bti_dbf weighs as much as the small network here; ssft tunes the stage it finds.
APART = ("bna", "bti_dbf", "clp", "lp", "ssft", "trigger_unlearning")
COUNTED = [name for name in methods.METHODS if name not in APART]


def of_a_step(method):
    """The operations of one step of a residual network."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10, width=4)
    batches = [(torch.rand(16, 3, 16, 16), torch.arange(16) % 10)] * 2
    counts = []
    # Whatever the first epoch needs, both runs need.
    for epochs in (1, 2):
        with FlopCounterMode(display=False) as counter:
            quick(model, batches, method=method, epochs=epochs)
        counts.append(counter.get_total_flops())
    return (counts[1] - counts[0]) / (2 * type(method).epochs_factor)


@pytest.fixture(scope="module")
def plain():
    return of_a_step(methods.get("ft"))


@pytest.mark.parametrize("name", COUNTED)
def test_a_step_costs_what_is_said(name, plain, monkeypatch):
    monkeypatch.setattr(methods.METHODS[name], "finish", lambda self, run: None)
    said = methods.METHODS[name].passes_per_image()
    # A quarter of fst_auto's epochs train the head alone: they only pass forward.
    share = 0.75 + 0.25 / 3 if name == "fst_auto" else 1.0
    counted = of_a_step(methods.get(name, **ALONE.get(name, {}))) / plain
    assert counted == pytest.approx(share * said, rel=0.08)


@pytest.mark.parametrize(
    ("words", "number"),
    [
        *(("1", 1), ("about 8", 8), ("1.1, and the searches", 1.1), ("at most 1", 1)),
        *(("none, but the search", 0), ("as many as it takes", None)),
    ],
)
def test_the_number_is_read_from_the_words(words, number, monkeypatch):
    monkeypatch.setattr(methods.METHODS["ft"], "cost", words)
    assert methods.get("ft").passes_per_image() == number


@pytest.mark.parametrize("name", ["clp", "lp"])
def test_no_pass_is_made_for_a_step_of_the_head_alone(name, plain):
    assert methods.METHODS[name].cost.startswith("none")
    assert of_a_step(methods.get(name)) < 0.01 * plain


@pytest.mark.parametrize("shortcut", [0, 2])
def test_a_stage_alone_costs_less_than_the_whole(shortcut, plain):
    """The gradients of earlier stages are not computed."""
    counted = of_a_step(methods.get("ssft", shortcut=shortcut)) / plain
    assert 1 / 3 < counted < 0.95
