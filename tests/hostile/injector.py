"""Children that are killed, or whose disk fails, at a chosen call or moment.

A child is forked from a warm process, as importing torch anew takes seconds and 1,000 are needed.
That is safe here: this process runs one thread (PyTorch is held to one, and nothing is computed
before the fork), so no lock is held by a thread that the child does not have.
"""

import errno
import io
import os
import select
import signal
import sys
import time
from dataclasses import dataclass

# Those by which files.py, checkpoint.py and resume.py touch the disk.
CALLS = ("open", "fdopen", "fsync", "replace", "rename", "link", "unlink", "mkdir", "close")
ASK_FOR_ROOM = ("write", "fdopen", "fsync", "link", "mkdir")
LONGEST_SECONDS = 120.0


@dataclass
class Ended:
    """How a child ended: the signal that killed it or 0, its exit status, and what it told."""

    killed: int
    status: int
    told: list[str]


def run(work, sabotage=None, watch=None):
    """Run ``work(tell)`` in a child; ``tell`` sends a line to the parent.

    Args:
        sabotage: called in the child before the work.
        watch: called as ``watch(pid, told)`` whenever a line came, with all lines so far.
    """
    assert len(os.listdir("/proc/self/task")) == 1, "fork needs a process of one thread"
    sys.stdout.flush()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(work, sabotage, writing)
    os.close(writing)
    told = _listen(reading, pid, watch)
    _, status = os.waitpid(pid, 0)
    return Ended(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, status >> 8, told)


def _child(work, sabotage, writing):
    status, plain_write = 1, os.write
    try:
        if sabotage is not None:
            sabotage()
        work(lambda line: plain_write(writing, f"{line}\n".encode()))
        status = 0
    except KeyboardInterrupt:
        status = 3
    except SystemExit as left:
        # How purify ends a process on SIGTERM, once the state is on the disk.
        status = int(left.code or 0)
    except OSError:
        status = 2
    except BaseException as error:
        plain_write(
            writing, f"error {type(error).__name__}: {' '.join(str(error).split())}\n".encode()
        )
    finally:
        os._exit(status)


def _listen(reading, pid, watch):
    text, end = b"", time.monotonic() + LONGEST_SECONDS
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            os.close(reading)
            return ["error hang"]
        more = os.read(reading, 4096)
        text += more
        lines = text.decode().splitlines()
        if not more:
            os.close(reading)
            return lines
        if watch is not None:
            watch(pid, lines)


class AtCall:
    """Counts the calls of CALLS and the writes to files; acts at the nth, from 1.

    A write counts twice: before it, and when half of the bytes are on their way to the disk. With
    ``lasting`` the act is repeated at whatever asks for room from then on.
    """

    def __init__(self, nth, act, lasting=False):
        self.nth, self.act, self.lasting, self.count = nth, act, lasting, 0

    def __call__(self):
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        real = os.fdopen

        def opened(descriptor, mode="r", *more, **options):
            file = real(descriptor, mode, *more, **options)
            return Halved(file, self.event) if "w" in mode else file

        os.fdopen = opened

    def _counted(self, name, real):
        def call(*arguments, **options):
            self.event(name)
            return real(*arguments, **options)

        return call

    def event(self, name="write"):
        self.count += 1
        again = self.lasting and self.count > self.nth and name in ASK_FOR_ROOM
        if self.count == self.nth or again:
            self.act()


def calls_of(work):
    """How many calls and writes there are to strike."""
    counting = AtCall(0, die)
    told = run(lambda tell: (work(tell), tell(f"calls {counting.count}")), counting).told
    return int(told[-1].removeprefix("calls "))


class Halved(io.RawIOBase):
    """A file open for writing, through which each write goes in two halves."""

    def __init__(self, file, event):
        self.file, self.event = file, event

    def write(self, data):
        self.event()
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.event()
        return half + self.file.write(data[half:])

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number):
    """An act that raises, as the system does."""

    def act():
        raise OSError(number, os.strerror(number))

    return act


FULL_DISK, READ_ONLY = fail(errno.ENOSPC), fail(errno.EROFS)
