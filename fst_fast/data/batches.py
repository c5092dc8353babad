"""What users pass in, checked once and in words: loaders, batches, devices, precisions."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Loader = Iterable[Any] | Callable[[], Iterable[Any]]

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Batches:
    """Any iterable of (images, labels), or a function that makes one, as checked epochs.

    Args:
        loader: a DataLoader, a list of batches, a function that returns a fresh iterator, or
            (for one epoch) an iterator.
        epochs: how often it will be iterated.
        where: the function and argument to name in errors, such as "purify: loader".
        at_once: the next epoch goes on behind the first batch, so that a DataLoader's workers
            start once; random draws are then those of now, not of the epoch.
    Raises:
        ValueError: empty, not iterable, or a one-shot iterator for more than one epoch.
    """

    def __init__(self, loader: Loader, epochs: int, where: str, *, at_once: bool = False) -> None:
        self.loader = loader
        self.where = where
        self._seek(0)
        source = self._source()
        iterator = iter(source)
        # An iterator is its own iter(); a DataLoader, even with persistent workers, is not.
        self._peeked = source if iterator is source else None
        if epochs > 1 and self._peeked is not None and self._source() is source:
            raise ValueError(
                f"{where} must be iterable once per epoch ({epochs} times), got a one-shot "
                f"{type(loader).__name__}; pass a DataLoader, a list of batches, or a function "
                "that returns a fresh iterator"
            )
        try:
            self.first = next(iterator)
        except StopIteration:
            raise ValueError(
                f"{where} must yield at least one batch, got none; check the dataset's length, "
                "batch_size and drop_last"
            ) from None
        self._opened = iterator if at_once else None

    def _seek(self, epoch: int) -> None:
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)

    def _source(self) -> Iterable[Any]:
        source = self.loader() if callable(self.loader) else self.loader
        if not isinstance(source, Iterable):
            raise ValueError(
                f"{self.where} must be an iterable of (images, labels) batches, got "
                f"{type(source).__name__}; wrap a dataset in torch.utils.data.DataLoader"
            )
        return source

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The batches of one epoch (0-based), as the loader yields them."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            return itertools.chain([self.first], opened)
        self._seek(epoch)
        source = self._source()
        # A one-shot iterator has already given its first batch away.
        return itertools.chain([self.first], source) if source is self._peeked else iter(source)


def check_batch(
    batch: Any,
    where: str,
    device: torch.device,
    num_classes: int | None = None,
    values: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return (images, labels) of a batch, or raise ValueError in words.

    Args:
        batch: (images [B, C, H, W] float, labels [B] integer); later entries are ignored.
        where: what to name in errors, such as "purify: loader".
        device: where the model is; batches come from the CPU or from there.
        num_classes: labels must lie in 0..num_classes-1; None leaves that to the caller.
        values: also look for NaN and Inf in images on the CPU.
    """
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        fix = "yield the labels as well: purification and evaluation need them"
        if isinstance(batch, Mapping):
            fix = "adapt it: lambda: ((b['pixel_values'], b['labels']) for b in loader)"
        raise ValueError(f"{where} must yield (images, labels), got {_describe(batch)}; {fix}")
    images, labels = batch[0], batch[1]
    _check_images(images, where, device, values)
    _check_labels(labels, where, len(images))
    # Reading a GPU tensor waits for the device: there the guard looks.
    if num_classes is not None and labels.device.type == "cpu":
        _check_label_range(labels, where, num_classes)
    return images, labels


def _check_images(images: Any, where: str, device: torch.device, values: bool) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        got = _describe(images)
        raise ValueError(
            f"{where} must yield images as a float tensor [B, C, H, W], normalised as in training, "
            f"got {got}; for stored bytes use fst_fast.DeviceLoader(images, labels, normalize=...)"
        )
    if len(images) == 0:
        raise ValueError(
            f"{where} must yield batches of at least one image, got {_describe(images)}"
        )
    if images.device.type != "cpu" and not _same_device(images.device, device):
        raise ValueError(
            f"{where} must yield images on cpu or {device}, where the model is, got "
            f"{images.device}; pass device='{images.device}' or move the loader"
        )
    if values and images.device.type == "cpu" and not images.sum(dtype=torch.float64).isfinite():
        bad = (~images.isfinite()).nonzero()
        if len(bad) > 0:
            raise ValueError(
                f"{where} must yield finite images, got {images[tuple(bad[0])].item()} at "
                f"[sample, channel, row, column] {bad[0].tolist()} of a batch; check the files "
                "and the normalisation (a standard deviation of 0?)"
            )


def _check_labels(labels: Any, where: str, count: int) -> None:
    fix = ""
    if isinstance(labels, Tensor):
        if labels.shape == (count, 1):
            fix = "; pass labels.flatten().long()"
        elif labels.ndim == 2:
            fix = "; one-hot or soft labels: pass labels.argmax(dim=1)"
        elif labels.is_floating_point() or labels.dtype == torch.bool:
            fix = "; pass labels.long()"
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
        or labels.shape != (count,)
    ):
        raise ValueError(
            f"{where} must yield labels as integer class indices [{count}], one per image, got "
            f"{_describe(labels)}{fix}"
        )


def _check_label_range(labels: Tensor, where: str, num_classes: int) -> None:
    # PyTorch has no aminmax for uint16 and wider.
    low, high = (int(v) for v in labels.to(torch.int64).aminmax())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{where} must yield labels in 0..{num_classes - 1} (the head has {num_classes} "
            f"classes), got {wrong}; check the label mapping"
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def resolve_device(device: torch.device | str | None, model: nn.Module) -> torch.device:
    """The device to work on: as given; else the model's GPU; else any GPU; else the CPU.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    if device is None:
        own = next((p.device for p in model.parameters()), torch.device("cpu"))
        use_gpu = own.type == "cpu" and torch.cuda.is_available()
        return torch.device("cuda") if use_gpu else own
    return existing_device(device)


def existing_device(device: torch.device | str) -> torch.device:
    """The device of this name, where this machine has it.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]  # PyTorch's may fill a screen
        raise ValueError(
            f"device must be one that this machine has, got {device!r}: {reason}; "
            'use device="cpu" or leave it out'
        ) from None
    return resolved


def resolve_precision(
    precision: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> str:
    """ "fp32", "bf16" or "fp16"; "auto" is the fastest that the device has instructions for.

    A model whose weights are not float32 keeps to its own dtype, which is called "fp32" here.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    if dtype != torch.float32:
        return "fp32"
    if device.type != "cuda":
        return "bf16" if native_bf16() else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the model's weights; float32 where it has none."""
    return next((p.dtype for p in model.parameters()), torch.float32)


def native_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 (AVX-512 BF16 or AMX)."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast for a resolved precision; for "fp32" the model's own dtype is used."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, AUTOCAST[precision])


def memory_layout(model: nn.Module, images: Tensor) -> torch.memory_format:
    """channels_last where the model takes it; contiguous where it does not, or may crash.

    Convolutions are faster in channels-last, but ``x.view(len(x), -1)`` after them is refused by
    PyTorch, so two images are tried. The model should be in eval mode.
    """
    if safe_layout(model, images.device) == torch.contiguous_format:
        return torch.contiguous_format
    with torch.no_grad():
        try:
            model(images[:2].contiguous(memory_format=torch.channels_last))
        except Exception:
            # Whatever it was, the first real batch meets it again, with nothing hidden.
            return torch.contiguous_format
    return torch.channels_last


def safe_layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """channels_last, but for models whose backward pass may then crash the process.

    On CPUs without AVX-512, oneDNN 3.12 writes past its memory in a channels-last 1x1 convolution
    with a stride and fewer than 8 input channels.
    """
    crashes = device.type == "cpu" and any(
        isinstance(m, nn.Conv2d)
        and m.kernel_size == (1, 1)
        and m.stride != (1, 1)
        and m.in_channels // m.groups < 8
        for m in model.modules()
    )
    return torch.contiguous_format if crashes else torch.channels_last
