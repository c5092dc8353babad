"""The most memory that a call holds beyond its inputs and the gradients that it returns.

On a GPU the allocator tells. On the CPU (Linux) a child process runs the call: its resident set
counts everything, C++ scratch included, where the profiler sees only tensors. There malloc gives
every block of 64 KiB or more back at once, so that nothing is hidden in memory held from before;
smaller blocks are not resolved. Its parent times under the usual malloc.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import cases, peers

METHOD = {
    "cuda": "torch.cuda.max_memory_allocated during a warm call, less what was allocated before "
    "and the returned gradients; a graph's pool holds as much for good",
    "cpu": "VmHWM less VmRSS in a child process whose malloc returns blocks of 64 KiB or more at "
    "once (MKL_DISABLE_FAST_MM=1), less the returned gradients; the second call at this size, with "
    "what the first one left behind (caches, compiled code) as kept_bytes; in huge cases the first "
    "call, which holds both; resolution about 0.3 MB",
}
CHILD_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MKL_DISABLE_FAST_MM": "1",
}
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def cuda_peak(case: cases.Case, variant: peers.Variant, inputs: Any) -> int:
    """In this process, on the GPU."""
    call = variant.make(inputs)
    call()
    case.clear(inputs)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return max(0, peak - before - case.returned_bytes)


class Child:
    """Another Python that answers one request a line; started when first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            # End of input ends it.
            self._process.communicate()
            self._process = None

    def peak(self, case: cases.Case, variant: str, threads: int) -> tuple[int, int | None]:
        """On the CPU: the peak, and what the first call of this size left behind.

        Raises:
            RuntimeError: it could not be measured; says why.
        """
        if not CLEAR.exists():
            raise RuntimeError("needs Linux's /proc/self/clear_refs")
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        request = {**cases.describe(case), "variant": variant, "threads": threads}
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process = None
            raise RuntimeError(f"the child process ended with status {process.wait()}")
        result = json.loads(answer)
        if "error" in result:
            raise RuntimeError(result["error"])
        return result["peak"], result["kept"]

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fst_fast.bench.memory"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **CHILD_ENVIRONMENT},
            text=True,
        )
        return self._process


def serve() -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            peak, kept = _resident_peak(request)
            answer: dict[str, Any] = {"peak": peak, "kept": kept}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        peers.forget_compiled()
        print(json.dumps(answer), flush=True)


def _resident_peak(request: dict[str, Any]) -> tuple[int, int | None]:
    torch.set_num_threads(request["threads"])
    case = cases.make(request["op"], request["shape"], request["dtype"])
    device = torch.device("cpu")
    (variant,) = (
        v for v in peers.variants(case, device) if v.name == request["variant"] and not v.graph
    )
    # Wakes the code up, so that its pages are not counted.
    variant.make(case.tiny().make_inputs(0, device))()
    inputs = case.make_inputs(0, device)
    call = variant.make(inputs)
    if case.huge:
        return _one(case, inputs, call), None
    before = _read("RssAnon")
    _one(case, inputs, call)
    kept = max(0, _read("RssAnon") - before)
    return _one(case, inputs, call), kept


def _one(case: cases.Case, inputs: Any, call: peers.Call) -> int:
    gc.collect()
    CLEAR.write_text("5")
    before = _read("VmRSS")
    kept = call()
    peak = _read("VmHWM")
    del kept
    case.clear(inputs)
    gc.collect()
    return max(0, peak - before - case.returned_bytes)


def _read(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


if __name__ == "__main__":
    serve()
