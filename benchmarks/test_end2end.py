"""One seed of ``python -m fst_fast.bench end2end`` on the digits: pytest benchmarks/test_end2end.py

That suite also compares what comes out, over several seeds.
"""

import functools

import pytest
import torch

from fst_fast.bench import end2end, jobs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)
def job():
    return jobs.make("digits", DEVICE, quick=DEVICE.type == "cpu")


@pytest.mark.parametrize("name", end2end.VARIANTS)
def test_end2end(benchmark, name):
    benchmark.group = "end2end digits"
    found = benchmark.pedantic(end2end.VARIANTS[name], (job(), DEVICE, 0), rounds=3)
    benchmark.extra_info |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clean_accuracy": found.clean_accuracy,
        "attack_success": found.attack_success,
    }
