"""Ctrl-C and SIGTERM as a request to stop after the step."""

from __future__ import annotations

import signal
import threading
import types
from typing import Any


class Interrupts:
    """Turns the first Ctrl-C into a request to stop after the step; the second one raises.

    Args:
        terminate: the same for SIGTERM, unless the program has a handler of its own. The process
            ends all the same, with its usual status: SystemExit is raised on the way out.
    """

    def __init__(self, terminate: bool = False) -> None:
        self.requested = False
        self._terminated = False
        self._terminate = terminate
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT]
            if self._terminate and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                numbers.append(signal.SIGTERM)
            self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self._terminated |= number == signal.SIGTERM
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        if self._terminated:
            raise SystemExit(128 + signal.SIGTERM)
