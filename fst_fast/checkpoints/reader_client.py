"""Asks another process to read a pickled model file, and outlives whatever becomes of it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MB = 1_000_000
# Runs a module of this folder without the packages' own imports, which take seconds.
_BOOT = """
import json, sys, types
folder, path, call, *arguments = sys.argv[1:]
sys.path[:] = json.loads(path)
for name in ("fst_fast", "fst_fast.checkpoints"):
    package = types.ModuleType(name)
    package.__path__ = [folder]
    sys.modules[name] = package
from fst_fast.checkpoints import reader_process
getattr(reader_process, call)(*arguments)
"""
# An interpreter and torch's libraries may need these to start; nothing of the user's passes.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR")
_START_SECONDS = 300
_REASON_BYTES = 65536


class NoAnswerError(Exception):
    """The reading process gave no answer; the text says what became of it."""


class RefusedError(Exception):
    """The reading process refused the file: its ``args`` are expected, got and remedy."""


def limits(size: int) -> dict[str, int]:
    """Return what reading ``size`` bytes may take: address space, output, seconds."""
    return {
        "memory_bytes": size + 160 * _MB,
        "output_bytes": size + 8 * _MB,
        "cpu_seconds": 4 + size // (20 * _MB),
        "wall_seconds": 30 + size // (2 * _MB),
    }


@contextlib.contextmanager
def ask(verb: str, path: Path) -> Iterator[str]:
    """Let the reading process work on a file.

    On Linux a process that has torch imported, and nothing else, is started at the first call and
    stays; it forks for every file, so that a call costs milliseconds. Elsewhere each call starts a
    process.

    Args:
        verb: a key of reader_process.VERBS.
    Returns:
        The name of a file with the answer, for the time of the ``with``. What is in it came from a
        process that read a hostile file: it is to be judged like one.
    Raises:
        RefusedError: the file was refused.
        NoAnswerError: the process crashed, or was ended for the time or the memory it took.
    """
    if sys.platform == "linux":
        with path.open("rb") as source, _unnamed() as out:
            request = {"verb": verb, **limits(os.fstat(source.fileno()).st_size)}
            status = _ask_server(request, source.fileno(), out)
            name = f"/proc/self/fd/{out}"
            _judge(status, request, name)
            yield name
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        name = str(Path(folder) / "answer")
        request = {"verb": verb, **limits(path.stat().st_size)}
        _judge(_ask_once(request, str(path.resolve()), name), request, name)
        yield name


def _judge(status: int, request: dict[str, Any], out: str) -> None:
    """Raise unless the answer is there. ``status``: the exit status, or minus a signal's number."""
    if status == 0:
        return
    if status == 1:
        with open(out, "rb") as file:
            text = file.read(_REASON_BYTES)
        with contextlib.suppress(ValueError, RecursionError):
            reason = json.loads(text)
            if isinstance(reason, list) and [type(part) for part in reason] == [str] * 3:
                raise RefusedError(*reason)
        raise NoAnswerError("gave an answer that cannot be read")
    if -status in (getattr(signal, "SIGXCPU", None), getattr(signal, "SIGALRM", None)):
        cpu, wall = request["cpu_seconds"], request["wall_seconds"]
        raise NoAnswerError(f"took more than {cpu} s of computing or {wall} s in all")
    if -status == getattr(signal, "SIGKILL", None):
        raise NoAnswerError("was killed, most likely for the memory it took")
    ended = f"signal {-status}" if status < 0 else f"exit status {status}"
    raise NoAnswerError(f"crashed ({ended})")


@contextlib.contextmanager
def _unnamed() -> Iterator[int]:
    """The descriptor of a file without a name, in memory."""
    descriptor = os.memfd_create("fst_fast", os.MFD_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _command(call: str, *arguments: str) -> list[str]:
    # "" is the current folder, in which a hostile file may lie beside a hostile torch.py.
    path = json.dumps([entry for entry in sys.path if entry])
    folder = str(Path(__file__).parent)
    return [sys.executable, "-I", "-c", _BOOT, folder, path, call, *arguments]


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _ask_once(request: dict[str, Any], source: str, out: str) -> int:
    command = _command("once", json.dumps(request), source, out)
    seconds = _START_SECONDS + request["wall_seconds"]
    try:
        return subprocess.run(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"took more than {seconds} s") from None
    except (OSError, ValueError) as error:
        raise NoAnswerError(f"could not be started: {error}") from None


class _Server:
    """The process that forks a reader for every request."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile() as errors:
            try:
                self.process = subprocess.Popen(
                    _command("serve", str(theirs.fileno())),
                    env=_environment(),
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=[theirs.fileno()],
                    # Ctrl-C is the asking process's to handle.
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                ours.close()
                raise NoAnswerError(f"could not be started: {error}") from None
            theirs.close()
            self.socket = ours
            self.peak_bytes = 0
            try:
                if self._receive(_START_SECONDS) is None:
                    errors.seek(0)
                    last = errors.read()[-300:].decode(errors="replace").strip()
                    raise NoAnswerError(f"could not be started: {last or 'no answer'}")
            except BaseException:
                self.end()
                raise

    def ask(self, request: dict[str, Any], source: int, out: int) -> int | None:
        """The reader's status as of _judge(); None where there is no server any more."""
        try:
            socket.send_fds(self.socket, [json.dumps(request).encode()], [source, out])
        except OSError:
            return None
        answer = self._receive(request["wall_seconds"] + 5)
        if answer is None:
            raise NoAnswerError("gave no answer")
        self.peak_bytes = answer["peak_bytes"]
        return os.waitstatus_to_exitcode(answer["status"])

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        self.socket.settimeout(seconds)
        try:
            message = self.socket.recv(65536)
        except OSError:
            return None
        return json.loads(message) if message else None

    def end(self) -> None:
        """Kill the server and what it forked."""
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class _Shared:
    server: _Server | None = None
    lock = threading.Lock()


def _ask_server(request: dict[str, Any], source: int, out: int) -> int:
    with _Shared.lock:
        try:
            # The second time, for a server that was ended from outside between two calls.
            for _ in range(2):
                if _Shared.server is None:
                    _Shared.server = _Server()
                status = _Shared.server.ask(request, source, out)
                if status is not None:
                    return status
                _end_server()
        except BaseException:
            # An answer that is still to come must not be taken for the next one's.
            _end_server()
            raise
    raise NoAnswerError("could not be kept alive")


def peak_bytes() -> int:
    """Memory of the last reader at its peak, with what it shares with the server; 0 before any."""
    return _Shared.server.peak_bytes if _Shared.server is not None else 0


def _end_server() -> None:
    server, _Shared.server = _Shared.server, None
    if server is not None:
        server.end()


def _forget_server() -> None:
    """In a fork of the asking process the server is the parent's."""
    _Shared.lock = threading.Lock()
    if _Shared.server is not None:
        _Shared.server.socket.close()
        # Popen would warn of a process that is still running.
        _Shared.server.process.returncode = 0
        _Shared.server = None


atexit.register(_end_server)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_server)
