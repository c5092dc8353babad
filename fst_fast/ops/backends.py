"""Which implementation runs an op, and why the others cannot.

An op called ``head_step_`` lives, by convention, in ``fst_fast.ops.reference.head_step``,
``fst_fast.kernels.head_step`` and ``torch.ops.fst_fast_native.head_step_``; a new op needs no line
here. Nothing native and no Triton is loaded before the first ``choose`` or ``report``.
"""

import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NAMES = ("reference", "cpu", "triton", "cuda")
AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
INFO_PATH = Path(__file__).parents[1] / "_build_info.json"


def choose(op: str, device: torch.device, backend: str | None = None) -> Callable[..., Any]:
    """The function that runs ``op`` on ``device``.

    Without ``backend`` and without ``FST_FAST_BACKEND`` the best that is available. With either,
    that one or an error: an explicit choice never falls back.

    Raises:
        ValueError: the name is none of reference, cpu, triton, cuda.
        RuntimeError: that backend cannot run here; says why, and what can.
    """
    return _choose(op, device.type, backend or os.environ.get("FST_FAST_BACKEND") or None)


@functools.cache
def _choose(op: str, device_type: str, backend: str | None) -> Callable[..., Any]:
    if backend is None:
        automatic = AUTOMATIC.get(device_type, ("reference",))
        backend = next(name for name in automatic if _obstacle(op, device_type, name) is None)
    if backend not in NAMES:
        raise ValueError(f"{op}: backend must be one of {', '.join(NAMES)}, got {backend!r}")
    if _obstacle(op, device_type, backend) is not None:
        raise RuntimeError(_refusal(op, device_type, backend))
    return _function(op, backend)


def available(op: str, device: torch.device) -> list[str]:
    """The backends that can run ``op`` on ``device``."""
    return [name for name in NAMES if _obstacle(op, device.type, name) is None]


def report() -> dict[str, dict[str, Any]]:
    """For each backend: is it usable on this machine, why not, and how it was built."""
    info = build_info()
    native = _native_obstacle()
    cuda = native or info["reasons"].get("cuda")
    if cuda is None and not torch.cuda.is_available():
        cuda = "no CUDA device"
    triton = _triton_obstacle()
    if triton is None and not torch.cuda.is_available() and not _interpreting():
        triton = "no CUDA device; TRITON_INTERPRET=1 runs it, slowly, on the CPU"
    compiled = {} if native else importlib.import_module("fst_fast._C").build_report()
    version = None if _triton_obstacle() else importlib.import_module("triton").__version__
    return {
        "reference": _row(None, version=torch.__version__),
        "cpu": _row(
            native,
            version=compiled.get("torch"),
            compiler=compiled.get("compiler"),
            architectures=compiled.get("instruction_sets"),
            using=compiled.get("instruction_set"),
        ),
        "triton": _row(triton, version=version, interpreter=_interpreting()),
        "cuda": _row(cuda, version=info["cuda"], architectures=info["architectures"]),
    }


def build_info() -> dict[str, Any]:
    """Return what setup.py wrote: built, torch, cuda, architectures, reasons."""
    try:
        return json.loads(INFO_PATH.read_text())
    except FileNotFoundError:
        reason = "fst_fast is not installed; run pip install --no-build-isolation -e ."
        reasons = {"cpu": reason, "cuda": reason}
        empty = {"built": False, "torch": None, "cuda": None, "architectures": None}
        return {**empty, "reasons": reasons}


def _row(reason: str | None, **details: Any) -> dict[str, Any]:
    return {"available": reason is None, "reason": reason, **details}


def _refusal(op: str, device_type: str, backend: str) -> str:
    reasons = {name: _obstacle(op, device_type, name) for name in NAMES}
    usable = ", ".join(name for name, reason in reasons.items() if reason is None)
    others = "; ".join(
        f"{name}: {reason}" for name, reason in reasons.items() if reason and name != backend
    )
    message = f"{op}: backend {backend!r} cannot run: {reasons[backend]}; available: {usable}"
    return message + (f"; not available: {others}" if others else "")


def _obstacle(op: str, device_type: str, backend: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on such a device, or None."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_obstacle(op) or _triton_device_obstacle(device_type)
    if backend != device_type:
        return f"the tensors are on {device_type}"
    reason = _native_obstacle() or build_info()["reasons"].get(backend)
    if reason is None and not _has_native_kernel(op, backend):
        reason = f"{op} has no {backend} kernel"
    return reason


def _triton_device_obstacle(device_type: str) -> str | None:
    if device_type == "cuda" or (device_type == "cpu" and _interpreting()):
        return None
    return f"the tensors are on {device_type}; on the CPU, TRITON_INTERPRET=1 runs it, slowly"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_obstacle(op: str | None = None) -> str | None:
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        # Any other failure is a broken installation, and silence would hide it.
        if error.name != "triton":
            raise
        return "triton is not installed"
    if op and importlib.util.find_spec(f"fst_fast.kernels.{op.rstrip('_')}") is None:
        return f"{op} has no triton kernel"
    return None


@functools.cache
def _native_obstacle() -> str | None:
    """Loads fst_fast._C, unless the build info says that it must not be."""
    info = build_info()
    if not info["built"]:
        return f"not built: {info['reasons']['cpu']}"
    if info["torch"] != torch.__version__:
        return (
            f"built for torch {info['torch']}, this is {torch.__version__}; "
            "reinstall with pip install --no-build-isolation"
        )
    if importlib.util.find_spec("fst_fast._C") is None:
        return "fst_fast/_C is missing for this Python; reinstall fst_fast"
    importlib.import_module("fst_fast._C")
    return None


def _has_native_kernel(op: str, backend: str) -> bool:
    return hasattr(torch.ops.fst_fast_native, op) and (
        torch._C._dispatch_has_kernel_for_dispatch_key(f"fst_fast_native::{op}", backend.upper())
    )


def _function(op: str, backend: str) -> Callable[..., Any]:
    if backend in ("cpu", "cuda"):
        return getattr(torch.ops.fst_fast_native, op).default
    package = "ops.reference" if backend == "reference" else "kernels"
    return getattr(importlib.import_module(f"fst_fast.{package}.{op.rstrip('_')}"), op)
