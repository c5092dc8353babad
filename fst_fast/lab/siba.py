"""Finds the pattern of SIBA on a surrogate model: few pixels, small changes, one for all images."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import autocast, memory_layout, resolve_device, resolve_precision
from ..data.device_loader import DeviceLoader
from ..heads.find import logits_of
from ..triggers.base import check_images
from ..triggers.pixels import Normalization, normalize_affine

# Each step moves by this share of epsilon, as in the paper.
STEP = 0.8
# A pattern is unpacked for images of at most this side.
LARGEST = 4096


@dataclass(frozen=True)
class SibaResult:
    """A pattern, and how it was found.

    Attributes:
        pattern: [H, W, C] int16 on the CPU, to be added to bytes.
        loss: mean loss of the epoch that it comes from, the lowest there was.
        history: mean loss of each epoch; infinite where it was not finite.
    """

    pattern: Tensor
    loss: float
    history: tuple[float, ...]


def find_siba(
    model: nn.Module,
    images: Tensor,
    *,
    target: int,
    k: int = 100,
    epsilon: int = 8,
    epochs: int = 200,
    batch_size: int = 128,
    beta: float = 10.0,
    normalize: Normalization | None = None,
    mask_every: int = 5,
    seed: int = 2,
    precision: str = "auto",
    device: torch.device | str | None = None,
    on_epoch: Callable[[int, float, float], None] | None = None,
) -> SibaResult:
    """The change of k pixels, by at most epsilon, that most drives images to the target class.

    Minimises the mean of ``min(cross_entropy(model(clip(images + pattern)), target), beta)`` over
    the pattern and over which pixels it may touch, in turn, as Gao et al. do (arXiv 2306.09212).
    Every batch takes a step of ``0.8 * epsilon`` against the sign of the gradient, and clamps; in
    the first batch of every ``mask_every`` epochs the mask becomes the k pixels whose gradient,
    summed over the channels, is largest. The pattern at the end of the epoch of lowest mean loss
    is kept. The defaults are the paper's.

    The steps do not end on whole bytes. The pattern is rounded to the nearest, once, at the end:
    an attacker stores bytes, and rounding never passes epsilon.

    Args:
        model: any image classifier, trained on data like these; works on a copy in eval mode.
        images: [M, H, W, C] uint8, of any classes.
        target: the attacker's class.
        k: pixels that may change, in all channels; 1..H*W.
        epsilon: greatest change of a byte, 1..255.
        epochs, batch_size: passes over the images, in an order drawn from the seed.
        beta: images whose loss is beyond it count as this, and do not pull.
        normalize: (mean, std) per channel, in units of 0..1, that the model was trained with.
        mask_every: epochs between two choices of pixels.
        seed: of the batches.
        precision: "auto", "fp32", "bf16" or "fp16" (autocast).
        device: None takes the model's GPU, else any GPU, else the CPU.
        on_epoch: called after each epoch with its number (from 1), mean loss and seconds so far.
    Raises:
        ValueError: an argument differs from the above, the model has no class ``target``, or the
            loss is never finite.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        >>> images = torch.full((4, 8, 8, 3), 100, dtype=torch.uint8)
        >>> found = fst_fast.lab.find_siba(model, images, target=1, k=5, epochs=2)
        >>> found.pattern.shape, int(found.pattern.abs().max()) <= 8
        (torch.Size([8, 8, 3]), True)
    """
    _check(images, k, epsilon, epochs, batch_size, beta, mask_every)
    place = resolve_device(device, model)
    channels = images.shape[-1]
    # The loader's batches hold bytes as floats, in which clipping to 0..255 is exact.
    loader = DeviceLoader(
        images,
        torch.zeros(len(images), dtype=torch.int64),
        batch_size,
        device=place,
        seed=seed,
        normalize=torch.arange(256.0).expand(channels, 256),
    )
    objective = _Objective(
        model, place, resolve_precision(precision, place), target, beta, normalize, channels
    )
    search = _Search(objective, tuple(images.shape[1:]), k, epsilon)
    started = time.perf_counter()
    for epoch in range(epochs):
        loss = search.epoch(loader, epoch % mask_every == 0)
        if on_epoch is not None:
            on_epoch(epoch + 1, loss, time.perf_counter() - started)
    return search.result()


class _Objective:
    """The loss of a pattern on a batch, and its gradient; nothing else changes."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: str,
        target: int,
        beta: float,
        normalize: Normalization | None,
        channels: int,
    ) -> None:
        # A copy: neither modes and flags nor the memory layout need to be put back, come what may.
        self.model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        self.device, self.precision = device, precision
        self.target, self.beta = target, beta
        self.dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        self.layout: torch.memory_format | None = None
        scale, shift = normalize_affine(channels, normalize)
        self.scale, self.shift = scale.to(device) / 255, shift.to(device)

    @torch.enable_grad()
    def __call__(self, images: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of [B, C, H, W] bytes as floats, and d sum / d delta [C, H, W]."""
        delta = delta.detach().requires_grad_()
        inputs = (images + delta).clamp(0, 255) * self.scale + self.shift
        if self.layout is None:
            self._start(inputs.detach())
        assert self.layout is not None
        inputs = inputs.to(self.dtype).contiguous(memory_format=self.layout)
        with autocast(self.device, self.precision):
            logits = logits_of(self.model(inputs))
        goal = torch.full((len(images),), self.target, device=self.device)
        losses = F.cross_entropy(logits.flatten(1).float(), goal, reduction="none")
        loss = losses.clamp(max=self.beta).sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        return loss.detach(), gradient

    def _start(self, inputs: Tensor) -> None:
        """Look at the first batch: the memory layout, and how many classes there are."""
        self.layout = memory_layout(self.model, inputs.to(self.dtype))
        if self.layout == torch.channels_last:
            self.model.to(memory_format=torch.channels_last)
        with torch.no_grad():
            first = inputs[:1].to(self.dtype).contiguous(memory_format=self.layout)
            classes = logits_of(self.model(first)).flatten(1).shape[1]
        if not 0 <= self.target < classes:
            raise ValueError(
                f"find_siba: target must be a class in 0..{classes - 1}, as the model has "
                f"{classes}, got {self.target}; check the label mapping"
            )


class _Search:
    """The alternation of pattern and mask, and the best of its epochs."""

    def __init__(self, objective: _Objective, shape: tuple[int, ...], k: int, epsilon: int) -> None:
        height, width, channels = shape
        self.objective, self.k, self.epsilon = objective, k, epsilon
        self.delta = torch.zeros(channels, height, width, device=objective.device)
        self.mask = torch.zeros(height, width, device=objective.device)
        self.best = self.delta
        self.history: list[float] = []

    def epoch(self, loader: DeviceLoader, choose: bool) -> float:
        """One pass; ``choose`` picks the pixels anew at its first batch. Returns the mean loss."""
        total = torch.zeros((), dtype=torch.float64, device=self.delta.device)
        for images, _ in loader:
            loss, gradient = self.objective(images, self.delta)
            total += loss
            if choose:
                self.mask, choose = _largest(gradient.abs().sum(0), self.k), False
            stepped = self.delta - STEP * self.epsilon * gradient.sign()
            self.delta = (stepped * self.mask).clamp_(-self.epsilon, self.epsilon)
        # The one wait for the device in an epoch.
        mean = total.item() / len(loader.images)
        if mean < min(self.history, default=math.inf):
            self.best = self.delta
        self.history.append(mean if math.isfinite(mean) else math.inf)
        return mean

    def result(self) -> SibaResult:
        loss = min(self.history)
        if not math.isfinite(loss) or not bool(self.best.isfinite().all()):
            raise ValueError(
                "find_siba: model must give finite logits for these images, got NaN; "
                'check normalize, or use precision="fp32"'
            )
        if not bool(self.best.any()):
            raise ValueError(
                f"find_siba: beta must be above the loss of some images, got {self.objective.beta} "
                f"and a mean loss of {loss:.4g} that no pixel changes; check normalize and target, "
                "or give a larger beta"
            )
        pattern = self.best.permute(1, 2, 0).round().to(torch.int16).contiguous().cpu()
        return SibaResult(pattern, loss, tuple(self.history))


def _largest(scores: Tensor, k: int) -> Tensor:
    """[H, W] float, 1 at the k largest scores and 0 elsewhere; of equal ones, the first."""
    # topk leaves open which of equal scores it takes; this must not depend on the device.
    chosen = scores.flatten().argsort(descending=True, stable=True)[:k]
    mask = torch.zeros_like(scores).flatten()
    return mask.index_fill_(0, chosen, 1).view_as(scores)


def pack_pattern(pattern: Tensor) -> dict[str, Any]:
    """[H, W, C] int16 as JSON data: its shape, and a line of text for each pixel that changes.

    A line holds row, column, and the change of each channel.
    """
    rows, columns = (pattern != 0).any(-1).nonzero(as_tuple=True)
    lines = [
        " ".join(map(str, (row, column, *pattern[row, column].tolist())))
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    return {"shape": list(pattern.shape), "pixels": lines}


def unpack_pattern(packed: Any) -> Tensor:
    """Return what :func:`pack_pattern` packed.

    Raises:
        ValueError: it did not pack this.
    """
    try:
        height, width, channels = map(int, packed["shape"])
        if not (0 < height <= LARGEST and 0 < width <= LARGEST and 0 < channels <= 4):
            raise ValueError(f"shape {packed['shape']}")
        pattern = torch.zeros(height, width, channels, dtype=torch.int16)
        for line in packed["pixels"]:
            row, column, *change = map(int, line.split())
            if not (0 <= row < height and 0 <= column < width and len(change) == channels):
                raise ValueError(f"pixel {line!r}")
            pattern[row, column] = torch.tensor(change, dtype=torch.int16)
    # TypeError and the others: JSON data of another form.
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"siba: pattern must be a shape and pixels as pack_pattern writes them, got {error}"
        ) from None
    return pattern


def _check(
    images: Tensor,
    k: int,
    epsilon: int,
    epochs: int,
    batch_size: int,
    beta: float,
    mask_every: int,
) -> None:
    check_images(images, "find_siba")
    if len(images) == 0:
        raise ValueError("find_siba: images must be at least one, got none; check the split")
    pixels = images.shape[1] * images.shape[2]
    for name, value, most, default in (
        ("k", k, pixels, 100),
        ("epsilon", epsilon, 255, 8),
        ("epochs", epochs, math.inf, 200),
        ("batch_size", batch_size, math.inf, 128),
        ("mask_every", mask_every, math.inf, 5),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            bounds = f"in 1..{most}" if math.isfinite(most) else ">= 1"
            raise ValueError(
                f"find_siba: {name} must be a whole number {bounds}, got {value!r}; the paper's "
                f"is {default}"
            )
    if not beta > 0:
        raise ValueError(f"find_siba: beta must be > 0, got {beta}; the paper's is 10")
