"""Triggers that are weaker in training than at test (Qi et al., ICLR 2023, arXiv 2205.13613)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ._settings import check_number, check_pattern, check_seed, fitted, half_up, plain_tuple
from .affine import _noise
from .base import Elementwise, Trigger

_TILES = 16


@dataclass(frozen=True, eq=False)
class BlendedInPart(Elementwise):
    """A faint picture with tiles missing, as :class:`AdaptiveBlend` puts on training images.

    Args:
        alpha: opacity of the pattern, 0..1.
        pattern: as of :class:`AdaptiveBlend`.
        seed: of the drawn pattern.
        dropped: how many of the 16 tiles are left out, others for each image.
    """

    alpha: float = 0.15
    pattern: Tensor | None = None
    seed: int = 0
    dropped: int = 8

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0, 1)
        check_number(self, "dropped", 0, _TILES, whole=True)
        check_seed(self)
        if self.pattern is not None:
            check_pattern(self, "pattern", (torch.uint8,))

    def tiles(self, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.rand(count, _TILES, generator=generator).argsort(1)[:, : self.dropped]
        return (1 << chosen).sum(1).to(torch.int32)

    def _apply(self, images: Tensor) -> Tensor:
        pattern = _picture(self, images.shape[1:], images.device).double()
        mixed = images.double()
        return half_up(mixed.add_((pattern - mixed).mul_(self.alpha)))


@dataclass(frozen=True, eq=False)
class AdaptiveBlend(Elementwise):
    """A faint picture, fainter and with tiles missing in training (Qi et al., ICLR 2023).

    Equals ``images + alpha * (pattern - images)`` in float64, rounded half up, as torchvision
    stores the floats in 0..1 that the original blends. Half of the images that carry it in
    training keep their label, at the paper's rates: see ``covers``. The defaults are the authors'.

    Args:
        alpha: opacity at test, 0..1.
        pattern: [H, W, C] uint8 of the images' size. None draws uniform noise from ``seed``.
        seed: of the drawn pattern.
        training_alpha: opacity in training, 0..1.
        dropped: how many of 4 x 4 tiles are left out of a training image, others for each.

    Example:
        >>> fst_fast.triggers.AdaptiveBlend().training()[0].alpha
        0.15
    """

    alpha: float = 0.2
    pattern: Tensor | None = None
    seed: int = 0
    training_alpha: float = 0.15
    dropped: int = 8

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0, 1)
        check_number(self, "training_alpha", 0, 1)
        check_number(self, "dropped", 0, _TILES, whole=True)
        check_seed(self)
        if self.pattern is not None:
            check_pattern(self, "pattern", (torch.uint8,))

    def training(self) -> tuple[Trigger, ...]:
        return (BlendedInPart(self.training_alpha, self.pattern, self.seed, self.dropped),)

    def covers(self) -> tuple[Trigger, ...]:
        return self.training()

    def _apply(self, images: Tensor) -> Tensor:
        return BlendedInPart(self.alpha, self.pattern, self.seed)._apply(images)


def _picture(trigger: BlendedInPart, shape: torch.Size, device: torch.device) -> Tensor:
    if trigger.pattern is None:
        return _noise(trigger.seed, shape, device)
    return fitted(trigger, trigger.pattern, shape, device)


# A drawn patch has so many cells to a side, and covers 5 / 32 of the shorter side.
_CELLS = 5
# The patches lie here, in thirds of what is left of the image beside a patch.
_PLACES = ((0, 0), (0, 3), (3, 0), (3, 3), (1, 1), (1, 2), (2, 1), (2, 2))


@functools.lru_cache(maxsize=32)
def _patch(seed: int, index: int, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """A drawn patch: pattern [H, W, C] uint8 and mask [H, W, 1] float64 in 0, 1."""
    height, width, channels = shape
    side = max(1, min(height, width) * _CELLS // 32)
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 256, (len(_PLACES), _CELLS, _CELLS, 4), generator=generator)
    cell = torch.arange(side) * _CELLS // side
    top, left = ((s - side) * p // 3 for s, p in zip((height, width), _PLACES[index], strict=True))
    pattern = torch.zeros(height, width, channels, dtype=torch.uint8)
    mask = torch.zeros(height, width, 1, dtype=torch.float64)
    place = (slice(top, top + side), slice(left, left + side))
    pattern[place] = cells[index][cell][:, cell, :channels].to(torch.uint8)
    mask[place] = 1
    return pattern.to(device), mask.to(device)


@dataclass(frozen=True, eq=False)
class Patches(Elementwise):
    """Some of the patches of :class:`AdaptivePatch`, one upon the other.

    Args:
        chosen: which.
        opacities: one for each, 0..1.
        patterns: as of :class:`AdaptivePatch`.
        masks: as of :class:`AdaptivePatch`.
        seed: of the drawn patches.
    """

    chosen: tuple[int, ...] = (0,)
    opacities: tuple[float, ...] = (1.0,)
    patterns: Tensor | None = None
    masks: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_given(self, self.patterns, self.masks)
        check_seed(self)
        _check_opacities(self, "opacities", plain_tuple(self, "opacities"))
        _check_chosen(self, "chosen", plain_tuple(self, "chosen"), self.patterns)
        if len(self.chosen) != len(self.opacities):
            raise ValueError(
                f"Patches: opacities must have one entry per chosen patch ({len(self.chosen)}), "
                f"got {self.opacities}; the default is 1 for one"
            )

    def _apply(self, images: Tensor) -> Tensor:
        mixed = images.double()
        for index, opacity in zip(self.chosen, self.opacities, strict=True):
            pattern, mask = self._patch_for(index, images.shape[1:], images.device)
            mixed.add_((pattern.double() - mixed).mul_(mask * opacity))
        return half_up(mixed)

    def _patch_for(
        self, index: int, shape: torch.Size, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        if self.patterns is None or self.masks is None:
            return _patch(self.seed, index, shape, device)
        pattern = fitted(self, self.patterns[index], shape, device)
        return pattern, self.masks[index, ..., None].double().to(device)


@dataclass(frozen=True, eq=False)
class AdaptivePatch(Elementwise):
    """Several patches, one per image and faint in training, some at once at test (Qi et al.).

    Equals ``images + alpha * mask * (pattern - images)`` for one patch after the other, in
    float64, rounded half up once at the end; from ICLR 2023, with its opacities. Of the images
    that carry one in training most keep their label, at the paper's rates: see ``covers``.

    The authors' pair for the test on CIFAR-10 has a patch that no training image carries. Here
    both are of the four; for one that is not, name its number, 4 or more, in ``test``.

    Args:
        alphas: opacity in training of patch 0, 1, ..., each 0..1.
        test: which patches are shown at test, fully opaque.
        patterns: [P, H, W, C] uint8 of the images' size, with ``masks``. None draws small squares
            of coloured cells, in the corners first, from ``seed``; their size follows the images'.
        masks: [P, H, W] float32 or float64, in 0..1: opacity of each pixel.
        seed: of the drawn patches.

    Example:
        >>> len(fst_fast.triggers.AdaptivePatch().training())
        4
    """

    alphas: tuple[float, ...] = (0.5, 0.2, 0.5, 0.3)
    test: tuple[int, ...] = (0, 2)
    patterns: Tensor | None = None
    masks: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_given(self, self.patterns, self.masks)
        check_seed(self)
        _check_opacities(self, "alphas", plain_tuple(self, "alphas"))
        _check_chosen(self, "test", plain_tuple(self, "test"), self.patterns)
        _check_chosen(self, "alphas", tuple(range(len(self.alphas))), self.patterns)

    def training(self) -> tuple[Trigger, ...]:
        return tuple(self._some((j,), (alpha,)) for j, alpha in enumerate(self.alphas))

    def covers(self) -> tuple[Trigger, ...]:
        return self.training()

    def _some(self, chosen: tuple[int, ...], opacities: tuple[float, ...]) -> Patches:
        return Patches(chosen, opacities, self.patterns, self.masks, self.seed)

    def _apply(self, images: Tensor) -> Tensor:
        return self._some(self.test, (1.0,) * len(self.test))._apply(images)


def _check_given(trigger: Trigger, patterns: Tensor | None, masks: Tensor | None) -> None:
    if patterns is None and masks is None:
        return
    patterns = check_pattern(trigger, "patterns", (torch.uint8,), "[P, H, W, C]")
    masks = check_pattern(trigger, "masks", (torch.float32, torch.float64), "[P, H, W]")
    name = type(trigger).__name__
    if masks.shape != patterns.shape[:3]:
        raise ValueError(
            f"{name}: masks must be {list(patterns.shape[:3])} like patterns, got "
            f"{list(masks.shape)}; give one [H, W] mask per pattern"
        )
    if not bool(((masks >= 0) & (masks <= 1)).all()):
        raise ValueError(
            f"{name}: masks must lie in 0..1, got {masks.min():.3g}..{masks.max():.3g}; "
            "divide masks of bytes by 255"
        )


def _check_opacities(trigger: Trigger, argument: str, given: object) -> None:
    if (
        not isinstance(given, tuple)
        or not given
        or not all(isinstance(alpha, int | float) and 0 <= alpha <= 1 for alpha in given)
    ):
        raise ValueError(
            f"{type(trigger).__name__}: {argument} must be a tuple of opacities in 0..1, one per "
            f"patch, got {given!r}; the paper's are (0.5, 0.2, 0.5, 0.3)"
        )


def _check_chosen(trigger: Trigger, argument: str, chosen: object, patterns: Tensor | None) -> None:
    count = len(_PLACES) if patterns is None else len(patterns)
    if (
        not isinstance(chosen, tuple)
        or not chosen
        or not all(isinstance(j, int) and 0 <= j < count for j in chosen)
    ):
        raise ValueError(
            f"{type(trigger).__name__}: {argument} must name patches in 0..{count - 1}, got "
            f"{chosen!r}; give more patterns and masks for more patches"
        )
