"""Set before any kernel is imported: without a GPU, Triton runs in its interpreter."""

import os

import emulated_cases
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors are small, and threads that wait for each other on a busy machine are not.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """Fills fresh memory with NaN, in Python and in C++, so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The CUDA ops, compiled for the CPU."""
    return emulated_cases.load(tmp_path_factory)


@pytest.fixture(params=["ascending", "descending"])
def ops(library, request):
    return emulated_cases.Emulation(library, request.param)
