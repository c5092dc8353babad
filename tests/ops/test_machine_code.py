"""What the compiler made of the CUDA kernels: wide stores, no spills, no fused multiply-add."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fst_fast.ops import backends

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);")
FUSED = re.compile(r"[FD]FMA\b")
# A pointer of which the compiler does not know the memory: slower than LDG and LDS.
GENERIC = re.compile(r"(LD|ST)\.")
# Spilled registers, or arrays that are indexed at run time.
LOCAL = re.compile(r"(LDL|STL)\b")
DEVIATION = ("small", "begin", "row", "finish")


def disassembler():
    """cuobjdump of the toolkit or of Triton's package, or None."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("cuobjdump", path=f"{home}/bin" if home else None)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found or shutil.which("cuobjdump")


def kernels_of(text):
    """Mangled name and architecture: instructions, each with its operands."""
    out = {}
    for binary in text.split("\nFatbin elf code:")[1:]:
        architecture = re.search(r"arch = (\w+)", binary).group(1)
        for part in binary.split("Function : ")[1:]:
            name = part.partition("\n")[0].strip()
            out[name, architecture] = INSTRUCTION.findall(part)
    return out


@pytest.fixture(scope="module")
def code():
    obstacle = backends.report()["cpu"]["reason"] or backends.build_info()["reasons"].get("cuda")
    if obstacle is not None:
        pytest.skip(f"no CUDA kernels are compiled: {obstacle}")
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump, neither of a CUDA toolkit nor of Triton")
    library = importlib.util.find_spec("fst_fast._C").origin
    command = [tool, "--dump-sass", library]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return kernels_of(result.stdout)


def of(code, kernel, but=()):
    found = {
        key: instructions
        for key, instructions in code.items()
        if kernel in key[0] and not any(word in key[0] for word in but)
    }
    assert found, f"no kernel is called {kernel}"
    return found


def names(instructions):
    return [name for name, _ in instructions]


def test_inject_stores_whole_vectors_at_once(code):
    for key, instructions in of(code, "inject_kernel").items():
        assert "STG.E.128" in names(instructions), key


# With one element at a time (Li1E), where a row is not aligned, nothing is wide.
@pytest.mark.parametrize(
    "kernel",
    ["rescale", "head_step", *(f"head_deviation_{name}" for name in DEVIATION)],
)
def test_the_head_stores_whole_vectors_at_once(code, kernel):
    for key, instructions in of(code, f"{kernel}_kernel", but=("Li1E",)).items():
        assert "STG.E.128" in names(instructions), key


@pytest.mark.parametrize("kernel", ["inject_kernel", "rescale_kernel", "head_deviation_begin"])
def test_the_memory_of_every_access_is_known(code, kernel):
    for key, instructions in of(code, kernel).items():
        assert not [name for name in names(instructions) if GENERIC.match(name)], key


def test_no_register_is_spilled(code):
    """But for the small head in float64 (Edd), in which nobody tunes, on sm_80."""
    for key, instructions in of(code, "_kernel", but=("Edd",)).items():
        assert not [name for name in names(instructions) if LOCAL.match(name)], key


def test_inject_rounds_every_product_and_every_sum(code):
    for key, instructions in of(code, "inject_kernel").items():
        assert not [name for name in names(instructions) if FUSED.match(name)], key


@pytest.mark.parametrize("element", ["If", "IN3c108BFloat16", "IN3c104Half"])
def test_head_step_fuses_nothing_but_the_sum_of_squares(code, element):
    """Of a product with zero the roots and divisions in float64 have one."""
    for key, instructions in of(code, f"head_step_kernel{element}").items():
        fused = [operands for name, operands in instructions if name.startswith("FFMA")]
        factors = [[word.strip() for word in operands.split(",")][1:3] for operands in fused]
        assert fused, key
        assert all(a == b or "RZ" in (a, b) for a, b in factors), (key, factors)
