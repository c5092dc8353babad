"""The process that reads pickled model files: it alone touches their bytes, under limits.

reader_client.py starts it with torch imported and nothing of the asking process in it. It stays, on
Linux, and forks a child for each file; elsewhere it is started for one file and reads that itself.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

import torch

from fst_fast.checkpoints import pickle_inspect, pickle_reader
from fst_fast.checkpoints.state_dicts import RefusedError

# Exit status of a reading: 0 with the result in the output, 1 with a reason as JSON.
READ, REFUSED = 0, 1


def _tensors(source: str, out: BinaryIO) -> None:
    pickle_reader.write(pickle_reader.read(source)[1], out)


VERBS: dict[str, Callable[[str, BinaryIO], None]] = {
    "tensors": _tensors,
    "facts": pickle_inspect.write,
}


def serve(descriptor: str) -> None:
    """Fork a reader for every request on a socket, until its other end is closed."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=int(descriptor)) as asked:
        asked.send(b"{}")
        while True:
            message, descriptors, _, _ = socket.recv_fds(asked, 65536, 2)
            if not message:
                return
            source, out = descriptors
            child = os.fork()
            if child == 0:
                asked.close()
                _read(json.loads(message), f"/proc/self/fd/{source}", f"/proc/self/fd/{out}")
            os.close(source)
            os.close(out)
            _, status, used = os.wait4(child, 0)
            asked.send(json.dumps({"status": status, "peak_bytes": used.ru_maxrss * 1024}).encode())


def once(request: str, source: str, out: str) -> NoReturn:
    """Read one file, given by name."""
    torch.set_num_threads(1)
    _read(json.loads(request), source, out)


def _read(request: dict[str, Any], source: str, out: str) -> NoReturn:
    """Answer one request and end the process, without unwinding what a hostile file built."""
    status = 2
    try:
        with open(os.devnull, "w") as nowhere:
            # A file's warnings are its author's words.
            os.dup2(nowhere.fileno(), 2)
        _limit(request)
        status = _answer(request["verb"], source, out)
    finally:
        os._exit(status)


def _answer(verb: str, source: str, out: str) -> int:
    try:
        # Buffered: a write to the file itself may end early and say so in its result alone.
        with open(out, "wb") as file:
            VERBS[verb](source, file)
        return READ
    except RefusedError as error:
        reason = error.reason
    except (MemoryError, RecursionError, OSError) as error:
        reason = (
            "a model file of its size",
            f"{type(error).__name__} while it was read",
            "the file is damaged or hostile: get a .safetensors file instead",
        )
    with open(out, "wb") as file:
        file.write(json.dumps(reason).encode())
    return REFUSED


def _limit(request: dict[str, Any]) -> None:
    """Let the system end this process where it takes more than a file of that size needs."""
    if sys.platform == "win32":
        return
    import resource

    limits = {
        resource.RLIMIT_CORE: 0,
        # A process for one file has computed before: it imported torch.
        resource.RLIMIT_CPU: request["cpu_seconds"] + math.ceil(time.process_time()),
        resource.RLIMIT_FSIZE: request["output_bytes"],
    }
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + request["memory_bytes"]
        # No further process, where the user is not root.
        limits[resource.RLIMIT_NPROC] = 0
    for limit, value in limits.items():
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        # The hard limit of time kills; the one below it says why.
        hard = value + 2 if limit == resource.RLIMIT_CPU and value != most else value
        resource.setrlimit(limit, (value, hard))
    signal.alarm(request["wall_seconds"])
