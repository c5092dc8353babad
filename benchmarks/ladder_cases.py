"""What test_loop.py and test_evaluate.py share: the rungs of a suite, checked, then timed."""

import functools

import torch

from fst_fast.bench import ladder, loop, loop_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 3


@functools.lru_cache(maxsize=1)
def checked(op):
    """The suite's case with its inputs, and what was found of each rung, by name."""
    (case,) = loop_cases.select(op, None, DEVICE.type == "cpu", DEVICE)
    inputs = case.make_inputs(DEVICE)
    found = loop.checked(case, ladder.RUNGS[op](DEVICE), inputs)
    return case, inputs, {rung.name: (rung, facts) for rung, facts in found.items()}


def names(op):
    return [rung.name for rung in ladder.RUNGS[op](DEVICE)]


def time_rung(benchmark, op, name):
    case, inputs, found = checked(op)
    rung, facts = found[name]
    # Nothing is timed that ends elsewhere than plain.
    assert facts.reason is None, facts.reason
    call = rung.make((inputs, case))

    def whole_run():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark.extra_info |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cold_s": facts.seconds,
        "how": str(facts.told["how"]),
    }
    benchmark.pedantic(whole_run, rounds=ROUNDS)
