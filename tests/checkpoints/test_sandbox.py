"""sandbox: whatever becomes of the reading process, the asking one has tensors or a LoadError."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoint_cases import Net, equal, refused, torch_save

from fst_fast.checkpoints import read_state_dict, reader_client

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the process that stays is Linux's")


@pytest.fixture
def path(tmp_path):
    return torch_save(tmp_path / "m.pt", Net().state_dict())


class Instead:
    """A server whose reader ends in a given way, with something in the answer."""

    def __init__(self, status, answer=b""):
        self.status, self.answer = status, answer

    def __call__(self, request, source, out):
        os.write(out, self.answer)
        return self.status


@LINUX
@pytest.mark.parametrize(
    ("status", "answer", "word"),
    [
        (-signal.SIGSEGV, b"", "crashed (signal 11)"),
        (-signal.SIGBUS, b"", "crashed (signal 7)"),
        (-signal.SIGKILL, b"", "killed, most likely for the memory"),
        (-signal.SIGXCPU, b"", "took more than 4 s of computing or 30 s in all"),
        (-signal.SIGALRM, b"", "took more than"),
        (2, b"", "crashed (exit status 2)"),
        (0, b"", "damaged answer"),
        (0, b"garbage" * 99, "damaged answer"),
        (0, b"\xff" * 8, "damaged answer"),
        (0, b"\x02" + bytes(7) + b"{}", "damaged answer"),
        (1, b"", "an answer that cannot be read"),
        (1, b"[" * 9999, "an answer that cannot be read"),
        (1, b'{"a": 1}', "an answer that cannot be read"),
        (1, b'["a", "b", 3]', "an answer that cannot be read"),
        (1, b'["a", "\\u001b[31m", "c"]', "got ?[31m"),
    ],
)
def test_every_end_of_the_reader_is_one_error(path, monkeypatch, status, answer, word):
    monkeypatch.setattr(reader_client, "_ask_server", Instead(status, answer))
    assert "\x1b" not in refused(path, word)


@LINUX
def test_a_server_that_is_gone_is_replaced(path, monkeypatch):
    read_state_dict(path)
    real = reader_client._Shared.server

    class Gone:
        def ask(self, *ignored):
            return None

        def end(self):
            pass

    monkeypatch.setattr(reader_client._Shared, "server", Gone())
    monkeypatch.setattr(reader_client, "_Server", lambda: real)
    assert equal(read_state_dict(path), torch.load(path, weights_only=True))


@LINUX
def test_a_server_that_stands_still_is_given_up(path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    read_state_dict(path)
    first = reader_client._Shared.server.process
    os.kill(first.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(reader_client, "limits", lambda size: dict(LIMITS, wall_seconds=-4))
        refused(path, "gave no answer")
    assert first.poll() == -signal.SIGKILL
    assert reader_client._Shared.server is None
    # The next one; it has nothing of the user's, and the standard streams and its socket open.
    assert equal(read_state_dict(path), torch.load(path, weights_only=True))
    pid = reader_client._Shared.server.process.pid
    assert b"SECRET_TOKEN" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert len(os.listdir(f"/proc/{pid}/fd")) == 4


LIMITS = {"memory_bytes": 10**9, "output_bytes": 10**8, "cpu_seconds": 9, "wall_seconds": 9}


@LINUX
@pytest.mark.parametrize(
    ("limit", "value", "word"),
    [("memory_bytes", 0, ""), ("output_bytes", 1000, "OSError"), ("wall_seconds", 1, "took more")],
)
def test_limits_hold(tmp_path, monkeypatch, limit, value, word):
    path = torch_save(tmp_path / "m.pt", {"w": torch.ones(2_000_000)}, zipped=False)
    if limit == "wall_seconds":
        # Opening it waits for a writer that never comes.
        path.unlink()
        os.mkfifo(path)
        monkeypatch.setattr("fst_fast.checkpoints.read.check_file", lambda path: None)
        monkeypatch.setattr("fst_fast.checkpoints.read.is_safetensors", lambda path: False)
        both = os.O_RDWR
        monkeypatch.setattr(Path, "open", lambda self, _: os.fdopen(os.open(self, both), "r+b", 0))
    monkeypatch.setattr(reader_client, "limits", lambda size: LIMITS | {limit: value})
    refused(path, word)


@LINUX
def test_threads_and_forks_share_nothing(path):
    want = torch.load(path, weights_only=True)
    right = []
    threads = [
        threading.Thread(target=lambda: right.append(equal(read_state_dict(path), want)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4
    child = os.fork()
    if child == 0:
        os._exit(0 if reader_client._Shared.server is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert equal(read_state_dict(path), want)


@LINUX
def test_it_ends_with_the_process_that_asked():
    code = (
        f"import os, sys; sys.path.insert(0, {str(Path(reader_client.__file__).parent)!r});"
        "import reader_client;"
        "print(reader_client._Server().process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    status = Path(f"/proc/{int(asked.stdout)}/status")
    for _ in range(300):
        if not status.exists() or "(zombie)" in status.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("it is still there")


def test_elsewhere_a_process_is_started_for_each_file(path, monkeypatch):
    monkeypatch.setattr(reader_client.sys, "platform", "other")
    assert equal(read_state_dict(path), torch.load(path, weights_only=True))


def test_a_python_that_cannot_be_started(path, monkeypatch):
    monkeypatch.setattr(reader_client._Shared, "server", None)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    refused(path, "could not be started")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    refused(path, "could not be started")


def test_limits_grow_with_the_file():
    small, large = reader_client.limits(1000), reader_client.limits(10**9)
    assert small["cpu_seconds"] < 5
    assert small["memory_bytes"] + small["output_bytes"] < 256e6
    assert large["memory_bytes"] + large["output_bytes"] < 2 * 10**9 + 256e6
    assert large["cpu_seconds"] == 54
    assert json.dumps(large)
