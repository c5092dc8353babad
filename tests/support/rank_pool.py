"""Processes in one process group, which run the same function again and again."""

import contextlib
import datetime
import io
import multiprocessing
import os
import socket
import sys
import traceback

import torch

CONTEXT = multiprocessing.get_context("forkserver")
# The server imports once, and every process that it forks has it.
CONTEXT.set_forkserver_preload(["rank_warm"])


@contextlib.contextmanager
def importable():
    """The server that forks is given this process's path: before Python 3.12.8 it forgets it."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve(rank, size, port, seconds, pipe):
    """Run what the pipe asks for until it closes; each answer is (result, None) or (None, why)."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((function(*arguments), None))
        except BaseException as error:
            error.__traceback__ and traceback.clear_frames(error.__traceback__)
            pipe.send((None, (type(error).__name__, str(error))))
    # The parent has closed the pipe: nothing is left to be done together.
    os._exit(0)


def _run_as_launched(rank, size, port, function, arguments, pipe):
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(shown):
        status = function(arguments)
    pipe.send((status, said.getvalue(), shown.getvalue()))


def launched(function, arguments, size=2):
    """Each rank's (result, standard output, standard error) of a function in torchrun's place."""
    port, answers, started = free_port(), [], []
    for rank in range(size):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(
            target=_run_as_launched, args=(rank, size, port, function, arguments, theirs)
        )
        with importable():
            process.start()
        started.append((process, ours))
    for process, pipe in started:
        assert pipe.poll(120), "a rank does not answer"
        answers.append(pipe.recv())
        process.join()
    return answers


class RankPool:
    """``size`` ranks over gloo; ``pool(function, *arguments)`` gives each rank's answer.

    Args:
        seconds: the time-out of the process group.
    """

    def __init__(self, size, seconds=60):
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=serve, args=(rank, size, port, seconds, theirs), daemon=True
            )
            with importable():
                process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def begin(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send((function, arguments))

    def answer(self, rank, seconds=120):
        """The result of a rank, or (None, (name of the exception, its words))."""
        assert self.pipes[rank].poll(seconds), f"rank {rank} does not answer"
        return self.pipes[rank].recv()

    def __call__(self, function, *arguments):
        self.begin(function, *arguments)
        return [self.answer(rank) for rank in range(len(self.pipes))]

    def results(self, function, *arguments):
        """The ranks' results; fails where one raised."""
        answers = self(function, *arguments)
        assert all(why is None for _, why in answers), [why for _, why in answers]
        return [result for result, _ in answers]

    def close(self):
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
