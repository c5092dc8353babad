"""The cases of ``python -m fst_fast.bench head``: pytest benchmarks/test_head_deviation_loss.py

Forward and backward of head_deviation_loss. That suite also interleaves the variants, measures
memory and writes records; here are pytest-benchmark's statistics and comparisons.
"""

import functools
import itertools

import pytest
import torch

from fst_fast.bench import cases, head, peers, timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    case
    for case in cases.select(None, list(cases.DTYPES), quick=DEVICE.type == "cpu")
    if isinstance(case, cases.LossCase)
]


def ids(case):
    return f"{case.B}x{case.D}x{case.K}-{case.dtype}"


def runnable(case):
    return [v for v in peers.variants(case, DEVICE) if v.obstacle is None]


PAIRS = [
    pytest.param(case, variant.name, id=f"{ids(case)}-{variant.name}")
    for case in CASES
    for variant in runnable(case)
]


# Nothing is timed that disagrees with float64.
@functools.lru_cache(maxsize=1)
def judged(case):
    return head.checked(case, runnable(case), DEVICE)


@functools.lru_cache(maxsize=1)
def input_sets(case):
    return head.make_sets(case, DEVICE)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_head_deviation_loss(benchmark, case, name):
    right, refused = judged(case)
    reasons = {variant.name: facts.reason for variant, facts in refused.items()}
    assert name not in reasons, f"{name} is wrong: {reasons[name]}"
    variant, facts = next(pair for pair in right.items() if pair[0].name == name)
    one_call, per_round = prepare(variant, input_sets(case))
    benchmark.group = ids(case)
    benchmark.extra_info |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "calls_per_round": per_round,
        "errors": {key: str(error) for key, error in facts.told["errors"].items()},
        "inaccurate": facts.reason,
    }
    rounds = 5 if case.huge else 50
    benchmark.pedantic(one_call, rounds=rounds, warmup_rounds=2 if case.huge else 5)


def prepare(variant, sets):
    """What is timed, and how many calls of the op it makes."""
    calls = [variant.make(inputs) for inputs in sets]
    if variant.graph:
        for call in calls[:2]:
            call()
        graph = timing.capture(calls)

        def replay():
            graph.replay()
            torch.cuda.synchronize()

        return replay, len(calls)
    turns = itertools.cycle(calls)

    def one_call():
        next(turns)()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return one_call, 1
