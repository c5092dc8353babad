"""Mutates files and watches a parser from outside: crashes, hangs, exceptions that are not its own.

Everything follows from the number of the mutation, so that a fault is found again by its number.
"""

import faulthandler
import mmap
import os
import random
import signal
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# Numbers at which sizes, offsets and counts go wrong.
_EXTREMES = [b"0", b"-1", b"1e9", b"65536", b"2147483648", b"9223372036854775807", b"1" * 40]
_TOKENS = [b"{}", b"[]", b"null", b'""', b"NaN", b"[" * 5000, b"\x00", b"\xff" * 8, b"../.."]


@dataclass
class Target:
    """A parser: what it may raise is ``allowed``; seeds are contents that it accepts."""

    name: str
    parse: Callable[[bytes], object]
    seeds: list[bytes]
    allowed: tuple[type[BaseException], ...]


@dataclass
class Found:
    """The numbers of mutations that went wrong, with words; and how many were accepted."""

    crashes: list[tuple[int, str]] = field(default_factory=list)
    hangs: list[tuple[int, str]] = field(default_factory=list)
    foreign: list[tuple[int, str]] = field(default_factory=list)
    accepted: int = 0

    @property
    def faults(self):
        return [*self.crashes, *self.hangs, *self.foreign]


def mutate(seeds, number):
    """The mutation of that number: one to four changes to one of the seeds."""
    rng = random.Random(number)
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        # Most of a file is weights; what steers a parser stands at its ends.
        if rng.random() < 0.5:
            at = min(at, rng.randrange(400)) if rng.random() < 0.6 else max(at, len(data) - 300)
        to = min(len(data), at + rng.choice((1, 2, 4, 8, 40, 400)))
        _change(rng, data, at, to, seeds)
    return bytes(data)


def _change(rng, data, at, to, seeds):
    kind = rng.randrange(9)
    if kind <= 2 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 3:
        data[at:to] = rng.randbytes(to - at)
    elif kind == 4:
        del data[at:to]
    elif kind == 5:
        data[at:at] = data[at:to] * rng.choice((1, 2, 50))
    elif kind == 6:
        data[at:to] = rng.choice((rng.choice(_EXTREMES), rng.choice(_TOKENS)))
    elif kind == 7:
        other = rng.choice(seeds)
        start = rng.randrange(len(other) + 1)
        data[at:to] = other[start : start + rng.choice((4, 40, 400))]
    elif rng.random() < 0.3:
        del data[at:]
    else:
        number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, rng.getrandbits(20)))
        data[at : at + 8] = struct.pack("<Q", number)


def run(target, count, seconds=5.0):
    """Parse mutations 0..count in a fork; where it dies or stands still, go on behind that one.

    Args:
        seconds: one mutation that takes longer is a hang.
    """
    found = Found()
    # The number of the mutation in work, and of those that were accepted.
    shared = mmap.mmap(-1, 16)
    with tempfile.TemporaryFile("w+") as log:
        while (at := _number(shared)) < count:
            child = os.fork()
            if child == 0:
                _work(target, at, count, shared, log)
            ended = _watch(child, shared, seconds)
            at = _number(shared)
            if ended is None:
                found.hangs.append((at, f"no end after {seconds} s"))
            elif at < count:
                found.crashes.append((at, f"wait status {ended}"))
            if at < count:
                shared[:8] = struct.pack("<Q", at + 1)
        log.seek(0)
        for line in log:
            number, _, text = line.strip().partition(" ")
            found.foreign.append((int(number), text))
    found.accepted = struct.unpack("<Q", shared[8:])[0]
    return found


def _number(shared):
    return struct.unpack("<Q", shared[:8])[0]


def _work(target, start, count, shared, log):
    try:
        # A crash is told by the wait status.
        faulthandler.disable()
        accepted = struct.unpack("<Q", shared[8:])[0]
        for number in range(start, count):
            shared[:] = struct.pack("<QQ", number, accepted)
            try:
                target.parse(mutate(target.seeds, number))
                accepted += 1
            except target.allowed:
                pass
            except BaseException as error:
                print(number, type(error).__name__, repr(str(error)[:200]), file=log, flush=True)
        shared[:] = struct.pack("<QQ", count, accepted)
        os._exit(0)
    finally:
        os._exit(1)


def _watch(child, shared, seconds):
    """The wait status of the worker; None where it had to be killed."""
    last, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        number = _number(shared)
        if number != last:
            last, since = number, time.monotonic()
        elif time.monotonic() - since > seconds:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)
