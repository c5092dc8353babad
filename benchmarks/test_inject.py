"""inject on each backend against PIL and vectorised torch: pytest benchmarks/test_inject.py"""

import itertools

import pytest
import torch

from fst_fast.bench import inject, inject_cases, inject_peers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("pil", "torch", "reference", "cpu", "triton", "cuda")


@pytest.mark.parametrize("shape", inject_cases.SHAPES, ids=lambda s: f"{s[0]}x{s[1]}x{s[2]}")
@pytest.mark.parametrize("family", inject_cases.FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_inject(benchmark, name, family, shape):
    case = inject_cases.InjectCase(family, *shape, "fp32")
    (variant,) = (v for v in inject_peers.variants(case, DEVICE) if v.name == name)
    if variant.obstacle is not None:
        pytest.skip(variant.obstacle)
    # Nothing is timed that disagrees with the reference.
    right, refused = inject.checked(case, [variant], DEVICE)
    assert list(right) == [variant], refused
    sets = [case.make_inputs(seed, DEVICE) for seed in range(1, 1 + inject_cases.SETS)]
    calls = itertools.cycle([variant.make(inputs) for inputs in sets])

    def one_batch():
        next(calls)()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{family} {shape[0]}x{shape[1]}x{shape[2]}"
    benchmark.extra_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    small = shape[1] <= 32 and variant.ours
    benchmark.pedantic(one_batch, rounds=50 if small else 5, warmup_rounds=2)
