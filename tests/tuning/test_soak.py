"""The memory of a run: a short part of make hostile."""

import sys

import pytest
from hostile import records, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def test_memory_does_not_grow_and_a_leak_is_seen():
    (row,) = soak.rows(full=False)
    assert records.within(row)
    assert soak.growth_percent(60, 30, leaks=True) > 1
