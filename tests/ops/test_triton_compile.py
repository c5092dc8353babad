"""Every Triton kernel compiles to a cubin for each GPU generation, without a GPU.

The interpreter that the other tests use accepts much that the compiler refuses.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from triton_compile_cases import (
    NO_SPILLS,
    TYPES,
    head_deviation_cases,
    head_step_cases,
    inject_cases,
)

from fst_fast.ops.dtypes import DTYPES
from fst_fast.ops.reference import inject as reference

pytest.importorskip("triton", reason="Triton is not installed")
tl = importlib.import_module("triton.language")

ARCHITECTURES = (80, 90, 100)

COMPILE = """
import collections, importlib, json, pathlib, subprocess, sys
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

cases, modules, no_spills = json.loads(sys.stdin.read())
kernels = {}
for name in modules:
    module = importlib.import_module("fst_fast.kernels." + name)
    kernels |= {n: kernel for n, kernel in vars(module).items() if n.endswith("_kernel")}
tool = pathlib.Path(nvidia.__file__).with_name("bin") / "cuobjdump"
cubin = pathlib.Path("kernel.cubin")
compiled_kernels = set()

def typed(kind):
    # A tuple with names arrives as a dictionary.
    if isinstance(kind, str):
        return kind
    return collections.namedtuple("Tables", kind)(*kind.values())

for name, types, constants, fused, architecture in cases:
    kernel = kernels[name]
    options = {"enable_fp_fusion": fused, "num_warps": constants.pop("num_warps", 4)}
    signature = {
        n: types.get("pointer" if n.endswith("_ptr") else "number") for n in kernel.arg_names
    }
    signature |= {n: typed(t) for n, t in types.items() if n in signature}
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
    source = ASTSource(kernel, signature, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert compiled.asm["cubin"][:4] == b"\\x7fELF", name
    assert fused or "fma" not in compiled.asm["ptx"], f"{name}: a multiply and an add were fused"
    compiled_kernels.add((name, architecture))
    usage = ""
    if name in no_spills:
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = usage.split("Function")[1].split("SHARED")[0]
        assert " STACK:0 " in usage, f"{name}, sm_{architecture}: registers are spilled, {usage}"
    print(name, architecture, usage.strip().replace(chr(10), " "))
architectures = {case[-1] for case in cases}
expected = {(name, architecture) for name in kernels for architecture in architectures}
assert compiled_kernels == expected, f"not compiled: {expected - compiled_kernels}"
"""


def compile_all(cases, modules, path):
    """Runs without the interpreter, which a process chooses once and for all."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(path)
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps([cases, modules, NO_SPILLS]),
        cwd=path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.split("\n")) - 1 == len(cases)
    return result.stdout


def spread(numbered, fused):
    """Every kernel for every generation; every type and flag for one of them."""
    return [(*case, fused, ARCHITECTURES[number % len(ARCHITECTURES)]) for number, case in numbered]


def test_head_step_compiles_for_every_generation(tmp_path):
    compile_all(spread(head_step_cases(), fused=False), ["head_step"], tmp_path)


def test_head_deviation_loss_compiles_for_every_generation_without_spills(tmp_path):
    modules = ["head_deviation_small", "head_deviation_rows", "head_deviation_gradients"]
    print(compile_all(spread(head_deviation_cases(), fused=True), modules, tmp_path))


def test_inject_compiles_for_every_generation_without_spills(tmp_path):
    print(compile_all(spread(inject_cases(), fused=False), ["inject"], tmp_path))


def test_the_types_are_those_of_the_ops():
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
    assert {names.get(dtype, "fp16") for dtype in DTYPES} == set(TYPES)


def test_inject_s_columns_and_flags_are_the_reference_s():
    kernel = importlib.import_module("fst_fast.kernels.inject_trigger")
    named = [name for name, value in vars(kernel).items() if isinstance(value, tl.constexpr)]
    for name in set(named) - {"COLUMNS", "LEVELS"}:
        assert getattr(kernel, name).value == getattr(reference, name), name
    assert {"KEY", "SEED", "MAPPED"} <= set(named)
