"""The CUDA ops compiled for the CPU, as torch.ops.fst_fast_emulated: see cuda_emulator."""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

FOLDER = Path(__file__).parents[1] / "cuda_emulator"
COMPILER = os.environ.get("CXX") or "c++"

needs_compiler = pytest.mark.skipif(
    os.name != "posix" or shutil.which(COMPILER.split()[0]) is None,
    reason=f"no C++ compiler for the emulation ({COMPILER})",
)


def compile_ops(library):
    flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off"]
    paths = [f"-I{path}" for path in (FOLDER, *include_paths())]
    paths += [f"-L{path}" for path in library_paths()]
    command = [*COMPILER.split(), *flags, *paths, FOLDER / "ops.cpp", "-o", library]
    result = subprocess.run(
        [*map(str, command), "-ltorch_cpu", "-lc10"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]


def load(tmp_path_factory):
    """The ops, compiled once for all test files and workers of a run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    library = folder / "emulated.so"
    # One worker compiles, and the others wait for it.
    with (folder / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compile_ops(folder / "unfinished.so")
            (folder / "unfinished.so").rename(library)
    torch.ops.load_library(library)
    return torch.ops.fst_fast_emulated


class Emulation:
    """The ops; threads run in ascending or in descending order."""

    def __init__(self, library, order):
        self.library = library
        self.descending = order == "descending"
        self.limit()

    def limit(self, resident=5, few_products=0, logits_bytes=0, chunk_rows=0):
        limits = (resident, few_products, logits_bytes, chunk_rows)
        self.library.set_limits(self.descending, *limits)

    def __getattr__(self, name):
        return getattr(self.library, name)
