"""The process group of a command that a launcher such as torchrun started on several ranks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def process_group(device: str | None, seconds: float, where: str) -> Iterator[bool]:
    """Join the ranks that the environment names; yields whether this one writes and reports.

    On the other ranks standard output leads nowhere. Without a launcher there is no group.

    Args:
        device: as asked for; on GPUs NCCL carries the tensors, on CPUs gloo.
        seconds: how long a rank waits for the others.
        where: the command to name in errors.
    Raises:
        ValueError: the environment names the ranks in part.
        RuntimeError: the ranks do not find each other, or a machine has too few GPUs.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if dist.is_available() and dist.is_initialized():
        yield dist.get_rank() == 0
        return
    if size == "1":
        yield True
        return
    _check_environment(size, seconds, where)
    try:
        dist.init_process_group(_backend(device, where), timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"{where}: the {size} ranks must find each other within {seconds:g} s, got "
            f"{type(error).__name__}: {str(error).splitlines()[0][:200]}; check MASTER_ADDR, and "
            "that all ranks were started"
        ) from error
    first = dist.get_rank() == 0
    try:
        with contextlib.ExitStack() as stack:
            if not first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield first
    finally:
        dist.destroy_process_group()


def _check_environment(size: str, seconds: float, where: str) -> None:
    missing = [name for name in _NEEDED if name not in os.environ]
    if not size.isdigit() or missing:
        got = f"no {', '.join(missing)}" if missing else f"WORLD_SIZE={size!r}"
        raise ValueError(
            f"{where}: the environment must name the rank beside WORLD_SIZE, got {got}; start with "
            "torchrun --nproc-per-node N -m fst_fast ..., or unset WORLD_SIZE"
        )
    if not seconds > 0:
        raise ValueError(f"{where}: --timeout must be a number of seconds > 0, got {seconds}")


def _backend(device: str | None, where: str) -> str:
    """Return the backend for the device; each rank of a machine takes a GPU of its own."""
    if not torch.cuda.is_available() or device == "cpu":
        return "gloo"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise RuntimeError(
            f"{where}: each rank of a machine must have a GPU of its own, got local rank {local} "
            f"and {torch.cuda.device_count()} GPUs; start fewer ranks, or use --device cpu"
        )
    torch.cuda.set_device(local)
    if not dist.is_nccl_available():
        print(f"{where}: NCCL is not in this PyTorch: gloo takes its place", file=sys.stderr)
        return "gloo"
    return "cpu:gloo,cuda:nccl"
