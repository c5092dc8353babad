"""The memory of a run: a short part of make hostile."""

import sys

import pytest
from hostile import records, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def test_memory_does_not_grow_and_a_leak_is_seen():
    (row,) = soak.rows(full=False)
    assert records.within(row)
    kept = []
    # 1 MiB an epoch, written to so that it is there.
    assert soak.growth_percent(60, 30, lambda: kept.append(b"x" * 2**20)) > 1
