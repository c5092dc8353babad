"""The steps by which a data parallel run begins: same arguments, one arrangement, one state."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..data.batches import Batches, resolve_device
from .cuda_graphs import Recording
from .distributed import Ranks
from .distributed_check import check_same
from .distributed_model import SharedModel
from .plan import Plan
from .progress import ProgressReport
from .resume import NAME, fingerprint
from .settings import ComputeSettings


def device_of_rank(
    device: torch.device | str | None, model: nn.Module, ranks: Ranks | None
) -> torch.device:
    """The device to work on; of several GPUs each rank of a machine takes its own."""
    found = resolve_device(device, model)
    local = os.environ.get("LOCAL_RANK", "")
    if ranks is None or found.type != "cuda" or found.index is not None or not local.isdigit():
        return found
    return torch.device("cuda", int(local) % torch.cuda.device_count())


def recording_of_ranks(graphs: bool | int | str, ranks: Ranks | None) -> Recording | None:
    """Return what a data parallel run records, which is nothing; None where it is no such run.

    Raises:
        ValueError: graphs are asked for.
    """
    if ranks is None:
        return None
    if graphs not in ("auto", False):
        raise ValueError(
            f'purify: graphs must be "auto" or False in a data parallel run, got {graphs!r}; its '
            "steps wait for other ranks, and are not recorded"
        )
    return Recording(None, False, None)


@contextlib.contextmanager
def in_step(plan: Plan, model: nn.Module, name: str, callbacks: int) -> Iterator[Plan]:
    """Check that all ranks were given the same; yields the plan of this rank.

    Args:
        model: the suspect.
        name: of its head.
        callbacks: how many there are.
    Raises:
        ValueError: the ranks differ, or this run cannot be data parallel.
    """
    ranks = plan.ranks
    if ranks is None:
        yield plan
        return
    _check_method(plan)
    check_same(ranks, {**_facts(plan, model, name), "number of callbacks": callbacks})
    ranks.use(plan.compute.device)
    with _mirrored(plan.resume, ranks) as folder:
        yield replace(plan, resume=folder)


def arranged_alike(
    ranks: Ranks | None, compute: ComputeSettings, settle: Callable[[], ComputeSettings]
) -> ComputeSettings:
    """Return the settled arrangement; that of rank 0, as it goes by the clock.

    Args:
        compute: as asked for.
        settle: settles it.
    """
    if ranks is None:
        return settle()
    data = json.dumps(settle().arrangement()).encode() if ranks.first else None
    found = ranks.from_first(data)
    assert found is not None
    return compute.arranged(json.loads(found))


def shared_model(plan: Plan, compute: ComputeSettings) -> SharedModel | None:
    """Return what runs the model on this rank's rows; None in a run of one process."""
    if plan.ranks is None:
        return None
    return SharedModel(plan.ranks, plan.batch_norm, compute.device)


def note_of_ranks(plan: Plan, report: ProgressReport) -> None:
    """Say how many ranks there are, and what each of them sees of batch norm."""
    if plan.ranks is None:
        return
    seen = "the whole batch" if plan.batch_norm == "global" else "each rank's own rows"
    report.note(f"purify: data parallel over {plan.ranks.size} ranks, batch norm over {seen}")


def settings_of_ranks(plan: Plan) -> dict[str, object]:
    """Return what the result's settings say of the ranks; nothing in a run of one process."""
    if plan.ranks is None:
        return {}
    return {"ranks": plan.ranks.size, "batch_norm": plan.batch_norm}


def _check_method(plan: Plan) -> None:
    method = plan.method
    if not method.data_parallel:
        raise ValueError(
            f"purify: method must be one that runs data parallel, got {method.name!r}, which looks "
            "into the model while it runs; call it in one process, before init_process_group()"
        )
    if plan.compute.compile:
        raise ValueError(
            "purify: compile must be False in a data parallel run, got True: the ranks meet within "
            "the model's forward, at its batch norms; leave compile out"
        )


def _facts(plan: Plan, model: nn.Module, name: str) -> dict[str, object]:
    """Everything that the run depends on and that is known before its first step."""
    facts = {
        "weights": fingerprint(model),
        "head": name,
        "seed": plan.seed,
        "epochs": plan.epochs,
        "lr": plan.lr,
        "momentum": plan.momentum,
        "deterministic": plan.deterministic,
        "resume": plan.resume is not None,
        "check": plan.check,
        "batch_norm": plan.batch_norm,
        "device": plan.compute.device.type,
        "backend": plan.compute.backend,
        "steps_per_epoch": plan.batches.steps,
        **plan.method.settings(),
        **plan.compute.arrangement(),
    }
    for words, batches in (("loader", plan.batches), ("validation", plan.validation)):
        facts |= {f"{words}'s {key}": value for key, value in _facts_of(batches).items()}
    return facts


def _facts_of(batches: Batches | None) -> dict[str, object]:
    if batches is None:
        return {"batches": "none"}
    shape = list(batches.first[0].shape[1:])
    return {"batches": batches.length(), "images": batches.images(), "image shape": shape}


@contextlib.contextmanager
def _mirrored(folder: str | Path | None, ranks: Ranks) -> Iterator[str | Path | None]:
    """The folder of a run's state: on ranks but the first, a passing copy of that of rank 0.

    So nothing but rank 0 need see the disk, and one process alone writes to it.
    """
    if folder is None:
        yield None
        return
    if ranks.first:
        path = Path(folder) / NAME
        ranks.from_first(path.read_bytes() if path.is_file() else None)
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        data = ranks.from_first(None)
        if data is not None:
            (Path(copy) / NAME).write_bytes(data)
        yield copy
