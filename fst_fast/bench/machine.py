"""Tells what the machine can do, and what it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fst_fast import checkpoints
from fst_fast.ops import backends

COPY_BYTES = 256 * 2**20
REPEATS = 5
PEERS = ("triton", "liger-kernel", "cut-cross-entropy")
FALLBACK_CACHE_BYTES = 32 * 2**20


def rates(device: torch.device, quick: bool = False) -> dict[str, float]:
    """Copy bandwidth (read + written); rates of torch.mm and a convolution: the best of a few."""
    size = COPY_BYTES // 4
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    seconds = _best(lambda: target.copy_(source), device)
    out = {"copy_gb_per_s": 2 * COPY_BYTES / seconds / 1e9}
    side = 8192 if device.type == "cuda" else (1024 if quick else 2048)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type == "cuda":
        dtypes["fp16"] = torch.float16
    for name, dtype in dtypes.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _best(lambda a=a, b=b: torch.mm(a, b), device)  # type: ignore[misc]
        out[f"{name}_gflop_per_s"] = 2 * side**3 / seconds / 1e9
        out[f"{name}_conv_gflop_per_s"] = _convolution(device, dtype, quick)
    return out


def _convolution(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """GFLOP/s of a 3 x 3 convolution in the middle of a ResNet; on a GPU float32 may be TF32."""
    batch, channels = (512, 512) if device.type == "cuda" else (8 if quick else 32, 256)
    images = torch.randn(batch, channels, 16, 16, device=device).to(dtype)
    kernel = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    images, kernel = (t.contiguous(memory_format=torch.channels_last) for t in (images, kernel))
    seconds = _best(lambda: torch.conv2d(images, kernel, padding=1), device)
    # A multiply-add with a padded pixel is counted as well, as FlopCounterMode does.
    return 2 * images.numel() * channels * 9 / seconds / 1e9


def _best(call: Callable[[], object], device: torch.device) -> float:
    times: list[float] = []
    for _ in range(REPEATS + 1):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
        # A machine without fast bfloat16 needs seconds for one.
        if times[-1] > 2:
            break
    return min(times)


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def cache_bytes(device: torch.device) -> int:
    """The last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.rstrip("K")) * 1024
    except (OSError, ValueError):
        return FALLBACK_CACHE_BYTES


def describe(device: torch.device) -> dict[str, Any]:
    """Name, size, driver."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": found.name,
            "memory_bytes": found.total_memory,
            "capability": f"{found.major}.{found.minor}",
            "cuda": torch.version.cuda,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }
    return {
        "type": "cpu",
        "name": _processor(),
        "cores": os.cpu_count(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """As in a checkpoint's manifest, and those of the peers that are installed."""
    out = checkpoints.versions()
    for name in PEERS:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def build() -> dict[str, Any]:
    """Say how each of our backends was built."""
    return backends.report()


def load_average() -> list[float] | None:
    """Over 1, 5 and 15 minutes, where the system tells."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None
