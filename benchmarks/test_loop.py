"""The cases of ``python -m fst_fast.bench loop``: pytest benchmarks/test_loop.py"""

import ladder_cases
import pytest


@pytest.mark.parametrize("name", ladder_cases.names("loop"))
def test_loop(benchmark, name):
    ladder_cases.time_rung(benchmark, "loop", name)
