"""Clean images of a trigger search, as pixels in 0..1, a tenth of them kept aside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batches import Batches, check_batch
from ..data.device_loader import DeviceLoader
from ..triggers.pixels import Normalization, normalize_affine

# A search keeps so many images, in so many bytes, and looks at so many to find them.
_IMAGES, _IMAGE_BYTES, _LOOKED_AT = 2048, 256 * 2**20, 200_000
# One image in so many of each class is kept aside, where a class has as many as this.
_ASIDE, _LEAST = 10, 4
# Pixels may lie outside 0..1 by this much, as rounding may take them there.
_SLACK = 0.01


@dataclass(frozen=True)
class SearchImages:
    """Clean images, and those kept aside: nothing is searched on them.

    Attributes:
        images: [N, C, H, W] float32 in 0..1.
        labels: [N] int64.
        aside, aside_labels: the same, kept aside; all of them where there are too few.
        low, span: [1, C, 1, 1]; ``images * span + low`` is what the model takes.
        notes: what a reader of the results must know.
    """

    images: Tensor
    labels: Tensor
    aside: Tensor
    aside_labels: Tensor
    low: Tensor
    span: Tensor
    notes: tuple[str, ...]


def collect(
    batches: Batches, device: torch.device, classes: int, normalize: Normalization | None
) -> SearchImages:
    """Read a loader once, as many images of each class as there is room for, and divide them.

    Args:
        batches: images as the model takes them, without random augmentation where the loader can
            leave it out.
        device: where the images are to be.
        classes: of the model.
        normalize: the (mean, std) that the images were normalised with; None means 0..1, or the
            range of what came.
    Raises:
        ValueError: a batch is not as described, or ``normalize`` does not fit.
    """
    found, labels = _read(batches, device, classes)
    low, span, note = _range(found, normalize)
    unit = ((found - low) / span).clamp_(0, 1)
    kept, told = _kept_aside(labels, classes)
    notes = tuple(text for text in (note, told) if text is not None)
    if not kept.any():
        return SearchImages(unit, labels, unit, labels, low, span, notes)
    return SearchImages(unit[~kept], labels[~kept], unit[kept], labels[kept], low, span, notes)


def _read(batches: Batches, device: torch.device, classes: int) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] float32 and labels [N]: the first ones of each class."""
    taken: list[Tensor] = []
    named: list[Tensor] = []
    counts = torch.zeros(classes, dtype=torch.int64)
    most = looked_at = 0
    loader = batches.loader
    # Random order takes an even share of each class's images.
    stored = loader.plain(shuffle=True) if isinstance(loader, DeviceLoader) else None
    for batch in batches.epoch(0) if stored is None else stored:
        images, labels = check_batch(batch, batches.where, device, classes)
        labels = labels.cpu().to(torch.int64)
        most = most or max(1, min(_IMAGES, _IMAGE_BYTES // (4 * images[0].numel())))
        _check_shape(images, taken, batches.where)
        rows = _wanted(labels, counts, max(1, most // classes))[: most - int(counts.sum())]
        counts += torch.bincount(labels[rows], minlength=classes)
        taken.append(images[rows.to(images.device)].to(device, torch.float32))
        named.append(labels[rows])
        looked_at += len(labels)
        if int(counts.sum()) == most or looked_at >= _LOOKED_AT:
            break
    return torch.cat(taken), torch.cat(named).to(device)


def _check_shape(images: Tensor, taken: list[Tensor], where: str) -> None:
    if taken and images.shape[1:] != taken[0].shape[1:]:
        raise ValueError(
            f"{where} must yield images of one size, got {list(images.shape[1:])} after "
            f"{list(taken[0].shape[1:])}; a universal trigger has one: resize them"
        )


def _wanted(labels: Tensor, counts: Tensor, each: int) -> Tensor:
    """Rows of a batch that bring no class above ``each`` images."""
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        rank[labels == label] = torch.arange(int((labels == label).sum()))
    return (rank + counts[labels] < each).nonzero().flatten()


def _range(images: Tensor, normalize: Normalization | None) -> tuple[Tensor, Tensor, str | None]:
    """The model's input for a black pixel, its distance to a white one, and a note if guessed."""
    channels = images.shape[1]
    if normalize is not None:
        scale, shift = normalize_affine(channels, normalize)
        low, span = (t.to(images.device)[None] for t in (shift, scale))
    else:
        low, span = torch.zeros(1, channels, 1, 1), torch.ones(1, channels, 1, 1)
        low, span = low.to(images.device), span.to(images.device)
    least, most = (v.item() for v in ((images - low) / span).aminmax())
    if least >= -_SLACK and most <= 1 + _SLACK:
        return low, span, None
    if normalize is not None:
        raise ValueError(
            "search: normalize must turn the loader's images back into pixels in 0..1, got "
            f"{least:.2f}..{most:.2f} with normalize={normalize}; pass the (mean, std) that the "
            "loader normalises with"
        )
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    return (
        low,
        (high - low).clamp(min=1e-6),
        f"the images were normalised (they lie in {least:.2f}..{most:.2f}) and normalize was not "
        "given: each channel's least and greatest value were taken for black and white",
    )


def _kept_aside(labels: Tensor, classes: int) -> tuple[Tensor, str | None]:
    """The mask [N] of images kept aside, every tenth of each class, and what is said of it.

    None are kept where fewer than two classes have four images: success is measured on images of
    other classes than the target.
    """
    kept = torch.zeros_like(labels, dtype=torch.bool)
    counts = torch.bincount(labels, minlength=classes)
    for label in (counts >= _LEAST).nonzero().flatten().tolist():
        kept[(labels == label).nonzero().flatten()[::_ASIDE]] = True
    short = int(((counts > 0) & (counts < _LEAST)).sum())
    if len(labels[kept].unique()) < 2:
        return torch.zeros_like(kept), (
            f"too few images to keep some aside (fewer than {_LEAST} of {short} classes): success "
            "was measured on the images of the search itself, which flatters it"
        )
    if short:
        return kept, f"{short} classes have fewer than {_LEAST} images: none of theirs kept aside"
    return kept, None
