"""head_deviation_loss in C++: every instruction set that the machine has, any number of threads."""

import pytest
import torch
from check import assert_same_bits
from head_deviation_cases import PLACES, Batch, each_dtype
from test_head_deviation_loss import assert_right

from fst_fast.ops import backends

CPU = ("cpu", "cpu")
HERE = any(p.values[0] == CPU for p in PLACES)
SETS = backends.report()["cpu"].get("architectures") or ["none"]
pytestmark = pytest.mark.skipif(not HERE, reason="the C++ ops are not built")
# Few classes, many, several panels of the products with leftovers, several depth blocks.
SHAPES = [(9, 3, 2), (67, 130, 10), (65, 300, 33), (29, 65, 517)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


@pytest.fixture(params=SETS)
def instruction_set(request):
    from fst_fast import _C

    best = _C.build_report()["instruction_set"]
    if SETS.index(request.param) > SETS.index(best):
        pytest.skip("more than this processor has")
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(best)


@pytest.mark.usefixtures("instruction_set", "poison")
@each_dtype
@each_shape
def test_every_instruction_set(dtype, shape):
    assert_right(Batch(shape, dtype), CPU)


@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set_with_every_setting():
    for K in (5, 150):
        batch = Batch(
            (41, 70, K),
            label_smoothing=0.1,
            class_weight=torch.rand(K) + 0.1,
            ignore_index=3,
        )
        batch.labels[::4] = 3
        assert_right(batch, CPU)


@each_dtype
@pytest.mark.parametrize("shape", [(300, 512, 10), (200, 300, 700)], ids=["few", "many"])
def test_the_number_of_threads_does_not_matter(dtype, shape):
    """Large enough that the work is shared."""
    batch = Batch(shape, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss = batch.ours("cpu").loss
            results.append({"loss": loss.detach(), **batch.grads(loss)})
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for name, got in result.items():
            assert_same_bits(got, results[0][name], name=name)
