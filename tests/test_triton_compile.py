"""Every Triton kernel compiles to a cubin for each GPU generation, without a GPU.

The interpreter that the other tests use accepts much that the compiler refuses.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

ARCHITECTURES = (80, 90, 100)
# Triton's names: element type, and the type it is computed in.
TYPES = {"fp64": "fp64", "fp32": "fp32", "bf16": "fp32", "fp16": "fp32"}

HEAD = ("weight_ptr", "d_weight_ptr", "weight_momentum_ptr")
BIAS = ("bias_ptr", "d_bias_ptr", "bias_momentum_ptr")


def pointers(names, kind):
    return dict.fromkeys(names, f"*{kind}")


def cases():
    """(kernel, argument types, constants) for every kernel x dtype x flag that a wrapper uses."""
    for element, compute in TYPES.items():
        scalars = pointers(("lr_ptr", "norm_ptr"), compute) | {"found_inf_ptr": "*fp32"}
        elements = pointers(HEAD + BIAS, element)
        partials = {"partials_ptr": f"*{compute}"}
        for flag in (True, False):
            flags = {"PROJECT": flag, "HAS_FOUND_INF": flag}
            yield (
                "head_step_small_kernel",
                elements | scalars | {"count": "i32", "bias_count": "i32"},
                {"MOMENTUM": 0.9, "BLOCK": 1024, "BLOCK_BIAS": 16, **flags},
            )
            # A count of 2**31 or more arrives as i64.
            yield (
                "head_step_update_kernel",
                elements | scalars | partials | {"count": "i64", "bias_count": "i32"},
                {"MOMENTUM": 0.9, "BLOCK": 2048, "HAS_FOUND_INF": flag},
            )
            yield (
                "head_step_write_kernel",
                elements | scalars | partials | {"count": "i64" if flag else "i32"},
                {"BLOCK": 2048, "MAX_PROGRAMS": 1024, **flags},
            )


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fst_fast.kernels import head_step

cases, architectures = json.loads(sys.stdin.read())
kernels = {n for n in vars(head_step) if n.endswith("_kernel")}
for name, types, constants in cases:
    kernel = getattr(head_step, name)
    types = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    for architecture in architectures:
        values = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
        source = ASTSource(kernel, types, values)
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
        assert compiled.asm["cubin"][:4] == b"\\x7fELF", name
        assert "fma" not in compiled.asm["ptx"], f"{name}: a multiply and an add were fused"
        kernels.discard(name)
        print(name, architecture)
assert not kernels, f"not compiled: {kernels}"
"""


def test_every_kernel_compiles_for_every_generation(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    listed = list(cases())
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps([listed, ARCHITECTURES]),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.split("\n")) - 1 == len(listed) * len(ARCHITECTURES)


def test_the_types_are_those_of_the_op():
    from fst_fast.ops.head_step import DTYPES

    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
    assert {names.get(dtype, "fp16") for dtype in DTYPES} == set(TYPES)
