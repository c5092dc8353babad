"""Refuses ranks that were not given the same run, and ends a run whose ranks have come apart."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .distributed import Ranks
from .run_state import RunState

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_same(ranks: Ranks, facts: Mapping[str, object], where: str = "purify") -> None:
    """Raise ValueError, on every rank, unless all ranks have the same facts.

    Args:
        facts: what the run depends on, in words, and its value.
    """
    texts = ranks.texts(json.dumps(dict(facts), default=str, sort_keys=True))
    ours = json.loads(texts[0])
    apart = []
    for rank, text in enumerate(texts):
        theirs = json.loads(text)
        for name in ours:
            if ours[name] != theirs.get(name):
                apart.append(
                    f"{name} ({_short(ours[name])} on rank 0, {_short(theirs.get(name))} "
                    f"on rank {rank})"
                )
    if apart:
        more = f" and {len(apart) - 4} more" if len(apart) > 4 else ""
        raise ValueError(
            f"{where}: all ranks must be given the same run, got another {', '.join(apart[:4])}"
            f"{more}; pass the same model, arguments and loader on every rank"
        )


def check_staged(ranks: Ranks, batch: tuple[int, int], interrupted: bool) -> bool:
    """Exchange what each rank has staged; (0, 0) says that its loader has come to an end.

    Args:
        batch: its images and its digest.
        interrupted: whether this rank was asked to stop.
    Returns:
        Whether some rank was.
    Raises:
        ValueError: the ranks have different batches; on every rank.
    """
    found = ranks.numbers([*batch, int(interrupted)])
    if any(row[:2] != found[0][:2] for row in found):
        got = ", ".join(
            f"{f'a batch of {images} (checksum {digest:08x})' if images else 'none'} on rank {rank}"
            for rank, (images, digest, _) in enumerate(found[:4])
        )
        raise ValueError(
            f"purify: loader must yield the same global batches on every rank, got {got}; each "
            "rank takes its own rows of them: use no DistributedSampler, and seed the loader's "
            "generator and its transforms alike on all ranks"
        )
    return any(row[2] for row in found)


def check_in_step(ranks: Ranks, state: RunState, device: torch.device, epoch: int) -> None:
    """Raise RuntimeError, on every rank, unless all ranks have the same tensors and random states.

    Args:
        state: its tensors are compared by the sum of their bits.
        epoch: that has ended, 0-based.
    """
    saved = state.saved()
    names = [*saved, "random state"]
    sums = [_sum_of_bits(tensor) for tensor in saved.values()]
    numbers = [int(value) for value in torch.stack([s.to(device) for s in sums]).tolist()]
    found = ranks.numbers([*numbers, _draws(device)])
    columns = zip(names, zip(*found, strict=True), strict=True)
    apart = [name for name, column in columns if len(set(column)) > 1]
    if apart:
        more = ", ..." if len(apart) > 3 else ""
        raise RuntimeError(
            f"purify: the ranks must stay in step, but in epoch {epoch + 1} they came apart in "
            f"{', '.join(apart[:3])}{more}; change the model in callbacks on all ranks or on none, "
            "and use deterministic=True where an operation of the model differs from call to call"
        )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    if value.dtype != torch.bool:
        value = value.view(_BITS[value.element_size()])
    return value.sum(dtype=torch.int64)


def _draws(device: torch.device) -> int:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return zlib.crc32(torch.cat(states).numpy().tobytes())


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:8]}..."
