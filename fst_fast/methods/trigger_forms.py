"""Forms of universal triggers that are searched by gradients: behind a mask, or added.

A universal trigger changes every image alike. Its size is held at a budget by projection: the area
of a mask, the root mean square of an added pattern. Neural Cleanse (Wang et al., IEEE S&P 2019)
searches masks with a price on their area instead, which needs a price for each model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .trigger_like import contents

# Tensors of a run, registered by name: they are recorded with the steps and kept for a resumed run.
Register = Callable[[str, Tensor], None]

# A new trigger's budget shrinks to its own over so many search steps.
ANNEAL = 30
# A search moves by this share of the budget's size in each step.
_STEP = 0.15
_MOMENTUM = 0.8


class TriggerForm:
    """P universal triggers of one form.

    Images and patterns are in units of the pixels' range, 0..1.

    Args:
        count: P.
        shape: (C, H, W) of the images.
        budget: what size a trigger may have; see the form.
        device: where the triggers are.
    Attributes:
        parameters: each [P, ...]; the first is held within the budget.
        target: [P] int64, the class that each is to make the answer.
        age: [P] float32, search steps since it was drawn.
        success: [P] float32, running share of images of other classes answered as the target.
        openness: [P] float32, the same share when the trigger has half of its budget. A trigger
            that was trained in still works then; one that a search made up mostly does not.
    """

    name: ClassVar[str]
    # A new trigger starts with so many times its budget.
    start: ClassVar[float]
    # The budget holds so many of the parameters, counted from the first.
    held: ClassVar[int] = 1

    def __init__(
        self, count: int, shape: tuple[int, int, int], budget: float, device: torch.device
    ) -> None:
        self.count, self.shape, self.budget, self.device = count, shape, budget, device
        self.parameters = [torch.zeros_like(drawn) for drawn in self._drawn()]
        self._momenta = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._squares = [torch.zeros_like(p) for p in self.parameters[self.held :]]
        self.target = torch.zeros(count, dtype=torch.int64, device=device)
        self.age = torch.zeros(count, device=device)
        self.success = torch.zeros(count, device=device)
        self.openness = torch.zeros(count, device=device)
        self.draw_anew(torch.ones(count, dtype=torch.bool, device=device))

    def register(self, register: Register) -> None:
        for kind in ("parameters", "_momenta", "_squares"):
            for number, tensor in enumerate(getattr(self, kind)):
                register(f"{self.name}.{kind.strip('_')}.{number}", tensor)
        for kind in ("target", "age", "success", "openness"):
            register(f"{self.name}.{kind}", getattr(self, kind))

    def _drawn(self) -> list[Tensor]:
        """Return parameters to start from."""
        raise NotImplementedError

    def apply(self, images: Tensor, parameters: Sequence[Tensor], strength: Tensor) -> Tensor:
        """Put a trigger on each of B images.

        Args:
            images: [B, C, H, W] in 0..1.
            parameters: as the form's own, [B, ...], one trigger for each image.
            strength: [B] in 0..1; 0 leaves an image as it is.
        """
        raise NotImplementedError

    def varied(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return triggers like these [B, ...], some of them changed."""
        return list(parameters)

    def sizes(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the size of each trigger, [P], in the budget's unit."""
        raise NotImplementedError

    def _hold(self, bound: Tensor) -> None:
        """Bring each trigger within its bound [P], in place."""
        raise NotImplementedError

    def _reach(self, bound: Tensor, numbers: int) -> Tensor:
        """Return the Euclidean length [P] of a step over the whole budget, by so many numbers."""
        raise NotImplementedError

    def bound(self) -> Tensor:
        """Return the budget of each trigger at its age, [P]."""
        left = (1 - self.age / ANNEAL).clamp(min=0)
        return self.budget * self.start**left

    @torch.no_grad()
    def halved(self) -> list[Tensor]:
        """Return the triggers within half of their budget."""
        kept = [parameter.clone() for parameter in self.parameters]
        self._hold(torch.full_like(self.age, 0.5 * self.budget))
        out = [parameter.clone() for parameter in self.parameters]
        for parameter, value in zip(self.parameters, kept, strict=True):
            parameter.copy_(value)
        return out

    @torch.no_grad()
    def draw_anew(self, which: Tensor) -> None:
        """Start the triggers of the mask ``which`` [P] from new random values."""
        for parameter, drawn in zip(self.parameters, self._drawn(), strict=True):
            parameter.copy_(torch.where(_like(which, parameter), drawn, parameter))
        for tensor in (*self._momenta, *self._squares, self.age, self.success, self.openness):
            tensor.masked_fill_(_like(which, tensor), 0)
        self._hold(self.bound())

    @torch.no_grad()
    def descend(self, gradients: Sequence[Tensor]) -> None:
        """Take a step against the gradients of the parameters, within the budget.

        A parameter that the budget holds goes a set share of it along its normalised gradient; the
        pattern behind a mask goes by Adam.
        """
        self.age += 1
        bound = self.bound()
        for number, gradient in enumerate(gradients):
            finite = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
            if number < self.held:
                self._along(number, finite, bound)
            else:
                self._adam(number, finite)
        self._hold(bound)

    def _along(self, number: int, gradient: Tensor, bound: Tensor) -> None:
        momentum, held = self._momenta[number], self.parameters[number]
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
        momentum.mul_(_MOMENTUM).add_(gradient / _like(length, gradient), alpha=1 - _MOMENTUM)
        held.sub_(momentum * _like(_STEP * self._reach(bound, held[0].numel()), held))

    def _adam(self, number: int, gradient: Tensor, lr: float = 0.1) -> None:
        mean, square = self._momenta[number], self._squares[number - self.held]
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient * gradient, 0.01)
        unbiased = mean / _like(1 - 0.9**self.age, mean)
        spread = (square / _like(1 - 0.99**self.age, square)).sqrt() + 1e-10
        self.parameters[number].sub_(lr * unbiased / spread)


class MaskForm(TriggerForm):
    """A pattern [C, H, W] behind a mask [1, H, W]: ``x + mask * (pattern - x)``.

    The budget is the sum of the mask as a share of the image's area.
    """

    name = "mask"
    start = 10.0
    # These shares of the triggers shown keep their pattern, and keep it saturated.
    kept: ClassVar[float] = 0.6
    saturated: ClassVar[float] = 0.2
    # Above it a mask is taken for opaque.
    solid: ClassVar[float] = 0.3

    def _drawn(self) -> list[Tensor]:
        channels, height, width = self.shape
        return [
            0.4 * torch.rand(self.count, 1, height, width, device=self.device),
            torch.rand(self.count, channels, height, width, device=self.device),
        ]

    def apply(self, images: Tensor, parameters: Sequence[Tensor], strength: Tensor) -> Tensor:
        mask, pattern = parameters
        return images + mask * _like(strength, mask) * (pattern - images)

    def varied(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Some of them keep the place: where the mask is, grown by a pixel, other contents.

        A search finds where a trigger lies sooner than what it shows: at that place many patterns
        make the class, and the one that was trained need not be the one that is found.
        """
        mask, pattern = parameters
        draw = _like(torch.rand(len(mask), device=mask.device), mask)
        grown = (F.max_pool2d(mask, 3, 1, 1) > self.solid).to(mask.dtype)
        own = ((pattern - 0.5) * 3 + 0.5).clamp(0, 1)
        other = torch.where(draw < self.kept + self.saturated, own, contents(pattern))
        keep = draw < self.kept
        return [torch.where(keep, mask, grown), torch.where(keep, pattern, other)]

    def sizes(self, parameters: Sequence[Tensor]) -> Tensor:
        return parameters[0].mean(dim=(1, 2, 3))

    def _hold(self, bound: Tensor) -> None:
        mask, pattern = self.parameters
        pattern.clamp_(0, 1)
        flat = mask.view(self.count, -1)
        area = bound * flat.shape[1]
        # The nearest mask in 0..1 of that sum is clamp(mask - t, 0, 1): t is found by bisection.
        low, high = torch.zeros_like(area), flat.amax(1)
        for _ in range(14):
            middle = (low + high) / 2
            over = (flat - middle[:, None]).clamp(0, 1).sum(1) > area
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        fits = flat.clamp(0, 1).sum(1) <= area
        flat.sub_(torch.where(fits, 0, high)[:, None]).clamp_(0, 1)

    def _reach(self, bound: Tensor, numbers: int) -> Tensor:
        return (bound * numbers).sqrt()


class PatchForm(MaskForm):
    """A mask that stamps 3 x 3 pixels at each place, with smooth colours: solid small patches.

    The budget is that of the mask, whose places each cover nine pixels.
    """

    name = "patch"
    kept = 1.0

    def apply(self, images: Tensor, parameters: Sequence[Tensor], strength: Tensor) -> Tensor:
        mask, pattern = parameters
        stamped = (9 * F.avg_pool2d(mask, 3, 1, 1)).clamp(0, 1)
        smooth = F.avg_pool2d(3 * pattern - 1, 3, 1, 1, count_include_pad=False).clamp(0, 1)
        return super().apply(images, (stamped, smooth), strength)


class AdditiveForm(TriggerForm):
    """A pattern [C, H, W] that is added: ``clip(x + pattern)``.

    The budget is the root mean square of the pattern.
    """

    name = "additive"
    start = 3.0
    # No pixel changes by more than this.
    most: ClassVar[float] = 0.2

    def _drawn(self) -> list[Tensor]:
        return [0.02 * torch.randn(self.count, *self.shape, device=self.device)]

    def apply(self, images: Tensor, parameters: Sequence[Tensor], strength: Tensor) -> Tensor:
        (pattern,) = parameters
        return (images + _like(strength, pattern) * pattern).clamp(0, 1)

    def sizes(self, parameters: Sequence[Tensor]) -> Tensor:
        return parameters[0].square().mean(dim=(1, 2, 3)).sqrt()

    def _hold(self, bound: Tensor) -> None:
        (pattern,) = self.parameters
        shrink = (bound / self.sizes(self.parameters).clamp(min=1e-9)).clamp(max=1)
        pattern.mul_(_like(shrink, pattern)).clamp_(-self.most, self.most)

    def _reach(self, bound: Tensor, numbers: int) -> Tensor:
        return bound * math.sqrt(numbers)


class WaveForm(TriggerForm):
    """An added pattern of few numbers: a profile of columns, one of rows and a coarse field.

    Stripes over the whole image (SIG, Barni et al., ICIP 2019) change pixels by far more than an
    added pattern of free pixels may; among patterns of so few numbers such a change stands out.
    The budget is the root mean square of the pattern.
    """

    name = "wave"
    start = 3.0
    held = 3
    # The coarse field has so many points along each side.
    coarse: ClassVar[int] = 8

    def _drawn(self) -> list[Tensor]:
        channels, height, width = self.shape
        return [
            0.02 * torch.randn(self.count, channels, *size, device=self.device)
            for size in ((1, width), (height, 1), (self.coarse, self.coarse))
        ]

    def _pattern(self, parameters: Sequence[Tensor]) -> Tensor:
        columns, rows, field = parameters
        smooth = F.interpolate(field, size=self.shape[1:], mode="bicubic", align_corners=True)
        return columns + rows + smooth

    def apply(self, images: Tensor, parameters: Sequence[Tensor], strength: Tensor) -> Tensor:
        return (images + _like(strength, images) * self._pattern(parameters)).clamp(0, 1)

    def sizes(self, parameters: Sequence[Tensor]) -> Tensor:
        return self._pattern(parameters).square().mean(dim=(1, 2, 3)).sqrt()

    def _hold(self, bound: Tensor) -> None:
        shrink = (bound / self.sizes(self.parameters).clamp(min=1e-9)).clamp(max=1)
        for parameter in self.parameters:
            parameter.mul_(_like(shrink, parameter))

    def _reach(self, bound: Tensor, numbers: int) -> Tensor:
        return bound * math.sqrt(numbers)


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """View values [P] so that they multiply a tensor [P, ...]."""
    return values.view(-1, *[1] * (tensor.dim() - 1))
