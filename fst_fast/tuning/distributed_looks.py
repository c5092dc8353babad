"""A model's answers to all images, of which each rank classifies its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import Batches
from ..measure.evaluate import measure
from .distributed import Ranks
from .settings import ComputeSettings


def answers_of(
    model: nn.Module,
    batches: Batches,
    compute: ComputeSettings,
    ranks: Ranks | None,
    fold: bool = True,
) -> Tensor:
    """Return labels and the model's answers to a pass over the images, [2, N] int64 on the CPU.

    Args:
        model: in eval mode afterwards as it was before.
        batches: the same on every rank; each classifies its rows of them.
        compute: settled.
        ranks: all of them get all answers; None in a run of one process.
        fold: as of :func:`fst_fast.measure.evaluate.measure`.
    """
    seen: list[Tensor] = []

    def watch(name: str | None, labels: Tensor, answered: Tensor) -> None:
        seen.append(torch.stack([labels, answered]))

    shares = ranks is not None and ranks.rows(len(batches.first[0])) is not None
    own = _own_rows(batches, ranks) if ranks is not None and shares else batches
    measure(model, own, compute.device, compute.precision, watch=watch, fold=fold)
    found = torch.cat(seen, dim=1).cpu()
    return _of_all(found, ranks) if ranks is not None and shares else found


def accuracy_of(
    model: nn.Module, batches: Batches, compute: ComputeSettings, ranks: Ranks | None
) -> float:
    """Return the share of the images that the model classifies as their label, in 0..1."""
    labels, answered = answers_of(model, batches, compute, ranks)
    return int((labels == answered).sum()) / len(labels)


def _own_rows(batches: Batches, ranks: Ranks) -> Batches:
    """This rank's rows of every batch; rank 0 has those that are too few to be shared."""

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches.epoch(0):
            images, labels = batch[0], batch[1]
            own = ranks.rows(len(images))
            if own is not None:
                yield images[own], labels[own]
            elif ranks.first:
                yield images, labels

    return Batches(rows, 1, batches.where)


def _of_all(found: Tensor, ranks: Ranks) -> Tensor:
    counts = [count for (count,) in ranks.numbers([found.shape[1]])]
    padded = F.pad(found, (0, max(counts) - found.shape[1]))
    rows = [torch.tensor(flat).view(2, -1) for flat in ranks.numbers(padded.flatten().tolist())]
    return torch.cat([row[:, :count] for row, count in zip(rows, counts, strict=True)], dim=1)
