"""Measures a model, before and after, on every test image of a report."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data.batches import Batches, Loader, check_batch, dtype_of, resolve_device, resolve_precision
from ..data.device_loader import DeviceLoader
from ..triggers import Trigger
from ..triggers.pixels import Normalization, pixel_range, recover_bytes
from .evaluate import measure
from .report import Measured, Observed, Samples

SAMPLES = 6


def examine(
    model: nn.Module,
    loader: Loader,
    *,
    suspect: nn.Module | None = None,
    trigger: Trigger | None = None,
    target: int = 0,
    normalize: Normalization | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
) -> Measured:
    """Classify every test image as it is and triggered, with both models.

    Args:
        model: the purified model.
        loader: as for :func:`fst_fast.evaluate`; iterated up to three times.
        suspect: the model before purification; None leaves "before" out.
        trigger, target, normalize, device, precision: as for :func:`fst_fast.evaluate`.
    Raises:
        ValueError: as :func:`fst_fast.evaluate`; or a loader that can be iterated only once.
    """
    place = resolve_device(device, model)
    batches = Batches(loader, 3, "report: test")
    if normalize is None and isinstance(loader, DeviceLoader):
        normalize = loader.normalize
    kind = resolve_precision(precision, place, dtype_of(model))

    def observe(source: Batches) -> tuple[Observed | None, Observed]:
        """Return what the suspect says of the batches, and what the model does."""
        named = {} if trigger is None else {"": trigger}
        found = []
        for observed in (suspect, model):
            answers = _Answers()
            if observed is not None:
                measure(observed, source, place, kind, named, target, normalize, answers)
            found.append(answers.observed())
        before, after = found
        assert after is not None
        return before, after

    before, after = observe(batches)
    images, labels = _few(batches, place, None if trigger is None else target)
    stored = _stored(images, normalize)
    samples = None
    if stored is not None:
        triggered = None if trigger is None else trigger.apply(stored).cpu().numpy()
        few = Batches([(images, labels)], 2, "report: test")
        samples = Samples(stored.cpu().numpy(), triggered, *observe(few))
    described = None if trigger is None else trigger.describe()
    return Measured(before, after, samples, described, target, str(place), kind)


class _Answers:
    """Labels and predicted classes of one pass; they stay on the device until the end."""

    def __init__(self) -> None:
        self.labels: list[Tensor] = []
        self.predicted: dict[str | None, list[Tensor]] = {}

    def __call__(self, name: str | None, labels: Tensor, predicted: Tensor) -> None:
        if name is None:
            self.labels.append(labels)
        self.predicted.setdefault(name, []).append(predicted)

    def observed(self) -> Observed | None:
        clean, triggered = (self.predicted.get(name) for name in (None, ""))
        if clean is None:
            return None
        return Observed(
            torch.cat(self.labels).cpu().numpy(),
            torch.cat(clean).cpu().numpy(),
            None if triggered is None else torch.cat(triggered).cpu().numpy(),
        )


def _few(batches: Batches, device: torch.device, target: int | None) -> tuple[Tensor, Tensor]:
    """The first image of each of the first classes that come, the target's left out."""
    found: dict[int, Tensor] = {}
    spare: tuple[int, Tensor] | None = None
    for batch in batches.epoch(0):
        images, labels = check_batch(batch, batches.where, device, values=False)
        for image, label in zip(images, labels.tolist(), strict=True):
            spare = spare or (label, image)
            if label != target:
                found.setdefault(label, image)
            if len(found) == SAMPLES:
                return _stacked(found)
    assert spare is not None
    return _stacked(found or dict([spare]))


def _stored(images: Tensor, normalize: Normalization | None) -> Tensor | None:
    """The images as bytes; None where ``normalize`` does not turn them into pixels."""
    low, high = (value.item() for value in pixel_range(images, normalize))
    return recover_bytes(images, normalize) if low >= -0.01 and high <= 1.01 else None


def _stacked(found: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    order = sorted(found)
    return torch.stack([found[label] for label in order]), torch.tensor(order)
