"""Set before any kernel is imported: without a GPU, Triton runs in its interpreter."""

import contextlib
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


def pytest_collection_finish(session):
    """Compiles the emulated ops where a test needs them: no test's time limit shall hold it."""
    wanted = any("library" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        # What fails is told by the tests, which try again.
        with contextlib.suppress(AssertionError, OSError):
            emulated_cases.build()


@pytest.fixture(scope="session")
def library():
    """The CUDA ops, compiled for the CPU."""
    return emulated_cases.load()


@pytest.fixture(params=["ascending", "descending"])
def ops(library, request):
    return emulated_cases.Emulation(library, request.param)
