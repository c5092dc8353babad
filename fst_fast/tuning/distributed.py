"""The ranks of one data parallel run: who they are, what they exchange, and how they end."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# At the end of a run, a rank waits so long for the others to have left it as well.
_FAREWELL = timedelta(seconds=30)
# The runs of a process have these numbers, which are the same on every rank.
_numbers = itertools.count()


class LostRankError(RuntimeError):
    """Another rank of a data parallel run failed, ended, or did not answer in time.

    Example:
        >>> issubclass(fst_fast.LostRankError, RuntimeError)
        True
    """


class Ranks:
    """The processes that tune one model together.

    Small facts go from host to host over gloo. Tensors of a step go over the backend that the
    process group has for their device: gloo on a CPU, NCCL on GPUs.

    Attributes:
        rank: of this process.
        size: how many processes there are, two at least.
        timeout: how long a rank waits for the others; that of the caller's process group.
    """

    def __init__(self, where: str) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout = _timeout()
        self._where, self._run = where, f"fst_fast/{next(_numbers)}"
        self._control: Any = None
        self._data: Any = None
        with self._calling():
            self._control = dist.new_group(backend="gloo", timeout=self.timeout)
        self._data = self._control

    @property
    def first(self) -> bool:
        """Return whether this is the rank that writes and reports."""
        return self.rank == 0

    def use(self, device: torch.device) -> None:
        """Send the tensors of steps from this device.

        Raises:
            ValueError: two ranks share a GPU, which NCCL does not allow.
        """
        if device.type != "cuda" or "nccl" not in str(dist.get_backend_config()):
            return
        index = torch.cuda.current_device() if device.index is None else device.index
        places = self.texts(f"{socket.gethostname()} {index}")
        twins = [rank for rank, place in enumerate(places) if place == places[self.rank]]
        # Every rank sees the same list, and all of them end.
        if len(set(places)) < self.size:
            raise ValueError(
                f"{self._where}: device must be another GPU on each rank, got {device} on ranks "
                f"{', '.join(map(str, twins))}; pass device=f\"cuda:{{os.environ['LOCAL_RANK']}}\""
            )
        with self._calling():
            self._data = dist.new_group(backend="nccl", timeout=self.timeout)

    def rows(self, count: int) -> slice | None:
        """Return this rank's rows of ``count``; None where some rank would get none of them."""
        if count < self.size:
            return None
        first, last = (count * (self.rank + more) // self.size for more in (0, 1))
        return slice(first, last)

    def sizes(self, count: int) -> list[int]:
        """Return how many of ``count`` rows each rank has."""
        ends = [count * rank // self.size for rank in range(self.size + 1)]
        return [last - first for first, last in itertools.pairwise(ends)]

    def total_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks, in the same bits on each."""
        with self._calling():
            dist.all_reduce(tensor, group=self._data)
        return tensor

    def most_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its greatest value over the ranks."""
        with self._calling():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._data)
        return tensor

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, of one shape."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._calling():
            dist.all_gather(found, tensor.contiguous(), group=self._data)
        return found

    def numbers(self, values: list[int]) -> list[list[int]]:
        """Return the integers of all ranks, equally many on each; over the hosts."""
        mine = torch.tensor(values, dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._calling():
            dist.all_gather(found, mine, group=self._control)
        return [numbers.tolist() for numbers in found]

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on some rank."""
        return [any(column) for column in zip(*self.numbers([*map(int, flags)]), strict=True)]

    def texts(self, text: str) -> list[str]:
        """Return the texts of all ranks."""
        data = text.encode()
        lengths = [numbers[0] for numbers in self.numbers([len(data)])]
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)[
            : len(data)
        ]
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._calling():
            dist.all_gather(found, mine, group=self._control)
        pairs = zip(found, lengths, strict=True)
        return [bytes(row[:length].tolist()).decode() for row, length in pairs]

    def from_first(self, data: bytes | None) -> bytes | None:
        """Return what rank 0 has; the others' own plays no part."""
        length = torch.tensor(-1 if data is None else len(data))
        with self._calling():
            dist.broadcast(length, 0, group=self._control)
            if length < 0:
                return None
            sent = torch.zeros(int(length), dtype=torch.uint8)
            if self.first and data:
                sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            dist.broadcast(sent, 0, group=self._control)
        return sent.numpy().tobytes()

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """Tell what became of the others where an exchange fails."""
        try:
            yield
        except LostRankError:
            raise
        except (RuntimeError, ValueError) as error:
            raise LostRankError(self._told(error)) from error

    def _told(self, error: Exception) -> str:
        seconds = self.timeout.total_seconds()
        faults = self._faults()
        if faults:
            told = "; ".join(f"rank {rank} ended with {text}" for rank, text in faults.items())
        else:
            told = (
                f"another rank ended or did not answer within {seconds:g} s "
                f"({str(error).splitlines()[0][:160]})"
            )
        return (
            f"{self._where}: the ranks must go on together, but {told}; rank {self.rank} of "
            f"{self.size} ends too, and what resume= had kept stays: start all ranks again with "
            "the same arguments"
        )

    def _faults(self) -> dict[int, str]:
        """Return what other ranks said before they ended."""
        found = {}
        # The store may have gone with the process that held it.
        with contextlib.suppress(Exception):
            store = _store()
            for rank in range(self.size):
                if rank != self.rank and store.check([f"{self._run}/fault/{rank}"]):
                    found[rank] = store.get(f"{self._run}/fault/{rank}").decode()
        return found

    def close(self, error: BaseException | None) -> None:
        """Leave the run; with an error, the others are told and end at their next exchange."""
        with contextlib.suppress(Exception):
            store = _store()
            if error is not None and not isinstance(error, LostRankError):
                text = f"{type(error).__name__}: {error}"
                store.set(f"{self._run}/fault/{self.rank}", text[:400])
            store.set(f"{self._run}/end/{self.rank}", "")
            if error is None:
                # A rank's last message is lost to the others if its connections close first.
                ends = [f"{self._run}/end/{rank}" for rank in range(self.size)]
                store.wait(ends, min(self.timeout, _FAREWELL))
        groups = {id(group): group for group in (self._control, self._data) if group is not None}
        # A connection closes with the last reference to its group.
        self._control = self._data = None
        while groups:
            with contextlib.suppress(Exception):
                dist.destroy_process_group(groups.popitem()[1])


@contextlib.contextmanager
def joined(where: str) -> Iterator[Ranks | None]:
    """The ranks of the process group that is initialised; None without one, or in one of one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield None
        return
    ranks = Ranks(where)
    try:
        yield ranks
    except BaseException as error:
        ranks.close(error)
        raise
    ranks.close(None)


def alone_note(where: str) -> str | None:
    """Return the note for a process that a launcher started beside others, without a group."""
    size = os.environ.get("WORLD_SIZE", "1")
    if (dist.is_available() and dist.is_initialized()) or not size.isdigit() or int(size) < 2:
        return None
    return (
        f"{where}: WORLD_SIZE is {size}, but this process has no process group, and tunes a model "
        "of its own; for one run of all call torch.distributed.init_process_group() first"
    )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _timeout() -> timedelta:
    """Return how long the caller's process group waits."""
    try:
        group = dist.distributed_c10d._get_default_group()
        found = group._get_backend(torch.device("cpu")).options._timeout
    except (RuntimeError, AttributeError):
        found = dist.distributed_c10d._get_default_timeout(dist.Backend(dist.get_backend()))
    assert isinstance(found, timedelta)
    return found
