"""The CUDA ops compiled for the CPU, as torch.ops.fst_fast_emulated: see cuda_emulator.

They are compiled when a session with tests of them has been collected, before the first test's time
begins, and kept in build/emulator until their sources, the compiler or torch are others.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "cuda_emulator"
CACHE = ROOT / "build" / "emulator"
SOURCES = (ROOT / "csrc", FOLDER)
COMPILER = os.environ.get("CXX") or "c++"
FLAGS = ("-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off")

needs_compiler = pytest.mark.skipif(
    os.name != "posix" or shutil.which(COMPILER.split()[0]) is None,
    reason=f"no C++ compiler for the emulation ({COMPILER})",
)


def digest():
    """Of all that the library is made from and with."""
    version = subprocess.run(
        [*COMPILER.split(), "--version"], capture_output=True, text=True, check=False
    ).stdout
    found = hashlib.sha256("\0".join([COMPILER, version, torch.__version__, *FLAGS]).encode())
    for path in sorted(path for folder in SOURCES for path in folder.rglob("*.*")):
        found.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:32]


def compile_ops(library):
    paths = [f"-I{path}" for path in (FOLDER, *include_paths())]
    paths += [f"-L{path}" for path in library_paths()]
    command = [*COMPILER.split(), *FLAGS, *paths, FOLDER / "ops.cpp", "-o", library]
    result = subprocess.run(
        [*map(str, command), "-ltorch_cpu", "-lc10"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]


def build():
    """The library, compiled unless it is there; what was made from other sources is removed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    library = CACHE / f"{digest()}.so"
    # One process compiles, and the others wait for it.
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compile_ops(CACHE / "unfinished")
            for other in CACHE.glob("*.so"):
                other.unlink()
            (CACHE / "unfinished").rename(library)
    return library


def load():
    torch.ops.load_library(build())
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
