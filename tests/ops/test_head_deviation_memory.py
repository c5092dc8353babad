"""The logits of many classes are never held as a whole."""

import pytest
import torch
from head_step_cases import CUDA

from fst_fast.bench import cases, memory, peers
from fst_fast.ops import backends

CASE = cases.LossCase(4096, 32, 26000, "fp32")  # 426 MB of logits, 3 MB of weight
DEVICE = torch.device("cuda" if CUDA else "cpu")
AVAILABLE = backends.available("head_deviation_loss", DEVICE)
# The interpreter would take minutes.
MEASURED = [name for name in AVAILABLE if CUDA or name != "triton"]


def share_of_logits(variant):
    """The peak beyond inputs and gradients."""
    if CUDA:
        inputs = CASE.make_inputs(0, DEVICE)
        (found,) = (v for v in peers.variants(CASE, DEVICE) if v.name == variant and not v.graph)
        return memory.cuda_peak(CASE, found, inputs) / CASE.yardstick_bytes
    with memory.Child() as child:
        return child.peak(CASE, variant, 1)[0] / CASE.yardstick_bytes


@pytest.mark.skipif(not CUDA and not memory.CLEAR.exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("backend", MEASURED)
def test_a_quarter_of_the_logits_at_most(backend):
    assert share_of_logits(backend) <= 0.25


@pytest.mark.skipif(not CUDA and not memory.CLEAR.exists(), reason="memory is read from /proc")
def test_eager_holds_them_and_the_measure_sees_it():
    assert share_of_logits("eager") > 0.9
