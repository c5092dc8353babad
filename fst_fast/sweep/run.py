"""Runs a sweep, alone or beside other processes, until every cell is done."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..data.batches import resolve_device
from ..tuning.autotune import threads_of
from .cells import Worker
from .config import Config, read_config
from .folder import SweepFolder, claimed
from .plan import Cell, cells_of, check_suspects, load_material, plan_of
from .report import SweepProgress, show_table
from .rows import Row, check_format, write_rows

# Between two looks at cells that others are at work on.
WAIT_SECONDS = 0.2


def run_sweep(path: str | Path, *, retry_failed: bool = False, quiet: bool = False) -> int:
    """Do all cells of the configuration, or what is left of them, and show the table.

    Every process that is started on the same configuration takes cells that no other has; one that
    ends, however it ends, leaves its cell to the others. All of them return when no cell is left.
    Of processes under ``torchrun``, only that of rank 0 writes and shows the table.

    Args:
        path: the YAML file.
        retry_failed: do cells again that failed.
        quiet: no progress.
    Returns:
        0 where every cell is whole; 1 where one failed or stopped early.
    Raises:
        ValueError: the configuration, or something that it names; or the folder belongs to another
            sweep.
        RuntimeError: the results' format cannot be written here.
        OSError: the disk refused.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    config = read_config(path)
    check_format(config.results)
    cells = cells_of(config)
    device = _device(config.device)
    material = load_material(config)
    check_suspects(config, material)
    folder = SweepFolder(config.out)
    plan = folder.open(plan_of(config, material, device))
    if retry_failed:
        for cell in cells:
            folder.forget_failure(cell)
    first = os.environ.get("RANK", "0") == "0"
    with (
        threads_of(plan["computed"]["threads"]),
        SweepProgress(len(cells), first and not quiet) as progress,
    ):
        worker = Worker(config, plan, material, folder, device)
        _do_all(cells, worker, folder, progress)
    rows = [folder.row(cell) for cell in cells]
    if first:
        _conclude(config, folder, rows)
    return 0 if all(row.whole for row in rows) else 1


def _device(asked: str | None) -> torch.device:
    """As asked for; under ``torchrun``, of several GPUs one for each process."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and asked in (None, "cuda") and torch.cuda.is_available():
        # More processes than GPUs: several small models in flight on each.
        return torch.device("cuda", int(rank) % torch.cuda.device_count())
    try:
        return resolve_device(asked, nn.Identity())
    except ValueError as error:
        raise ValueError(f"sweep: {error}") from None


def _do_all(
    cells: Sequence[Cell], worker: Worker, folder: SweepFolder, progress: SweepProgress
) -> None:
    """Take free cells until all are finished."""
    finished = [cell for cell in cells if folder.finished(cell)]
    if finished:
        progress.note(f"sweep: goes on; {len(finished)} of {len(cells)} cells are done")
    for cell in finished:
        # Left by a process that ended between a cell's end and the tidying up.
        folder.clear(cell)
    while waiting := [cell for cell in cells if not folder.finished(cell)]:
        progress.done(len(cells) - len(waiting))
        took = [_take(cell, worker, folder, progress) for cell in waiting]
        if not any(took):
            time.sleep(WAIT_SECONDS)
    progress.done(len(cells))


def _take(cell: Cell, worker: Worker, folder: SweepFolder, progress: SweepProgress) -> bool:
    """Do the cell if nobody else does or has; returns whether."""
    with claimed(folder.of(cell), wait=False) as mine:
        if not mine or folder.finished(cell):
            return False
        progress.begin(cell)
        progress.cell(worker.do(cell, progress.epoch))
        return True


def _conclude(config: Config, folder: SweepFolder, rows: Sequence[Row]) -> None:
    with claimed(config.out, wait=True):
        path = write_rows(config.out, rows, config.results)
    show_table(rows)
    failed = sum(row.error is not None for row in rows)
    stopped = sum(row.stopped is not None for row in rows)
    print(f"{len(rows)} cells, {failed} failed, {stopped} stopped early; wrote {path}")
