"""The cases of ``python -m fst_fast.bench evaluate``: pytest benchmarks/test_evaluate.py"""

import ladder_cases
import pytest


@pytest.mark.parametrize("name", ladder_cases.names("evaluate"))
def test_evaluate(benchmark, name):
    ladder_cases.time_rung(benchmark, "evaluate", name)
