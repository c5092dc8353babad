"""Images that a model takes for something else: the base of label-consistent poisoning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import resolve_device, safe_layout
from ..data.device_loader import DeviceLoader
from ..heads.contexts import evaluating
from ..heads.find import logits_of
from ..triggers.base import check_images
from ..triggers.pixels import Normalization, normalize_affine

BATCH = 500


def mislead(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    normalize: Normalization | None = None,
    epsilon: int = 8,
    step: float = 1.5,
    steps: int = 100,
    device: torch.device | str | None = None,
) -> Tensor:
    """Change images, by at most epsilon in each byte, so that the model errs on them.

    Projected gradient ascent on the cross-entropy with the true label, along the gradient's sign
    (Madry et al., arXiv 1706.06083), as Turner et al. make their poison hard to learn by anything
    but the trigger (arXiv 1912.02771). The defaults are BackdoorBench's.

    Args:
        model: trained on data like these; left as it is, works in eval mode.
        images: [N, H, W, C] uint8.
        labels: [N] int64, their true classes.
        normalize: (mean, std) per channel, in units of 0..1, that the model was trained with.
        epsilon: greatest change of a byte, 0..255.
        step: of each ascent, in units of bytes.
        steps: how many, 0 or more.
        device: None takes the model's GPU, else any GPU, else the CPU.
    Returns:
        [N, H, W, C] uint8 on the images' device, rounded to the nearest byte once at the end.
    Raises:
        ValueError: images are no bytes, or a number is out of its bounds.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        >>> images = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
        >>> changed = fst_fast.lab.mislead(model, images, torch.tensor([0, 1]), epsilon=4, steps=5)
        >>> int((changed.int() - 100).abs().max()) <= 4
        True
    """
    check_images(images, "mislead")
    if not 0 <= epsilon <= 255 or step <= 0 or steps < 0:
        raise ValueError(
            "mislead: epsilon must be in 0..255, step > 0 and steps >= 0, got "
            f"{epsilon}, {step} and {steps}; the defaults are 8, 1.5 and 100"
        )
    if len(images) == 0:
        return images.clone()
    place = resolve_device(device, model)
    scale, shift = normalize_affine(images.shape[-1], normalize)
    objective = _Loss(model, scale.to(place) / 255, shift.to(place), safe_layout(model, place))
    # Bytes as floats, in which clipping to 0..255 is exact.
    loader = DeviceLoader(
        images,
        labels,
        BATCH,
        shuffle=False,
        device=place,
        normalize=torch.arange(256.0).expand(images.shape[-1], 256),
    )
    parts = []
    with evaluating(model, place):
        for x, y in loader:
            moved = x
            for _ in range(steps):
                ascended = moved + step * objective.gradient(moved, y).sign()
                moved = torch.clamp(ascended, x - epsilon, x + epsilon).clamp_(0, 255)
            parts.append(moved.round().to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(parts).contiguous().to(images.device)


class _Loss:
    """The model's cross-entropy on bytes as floats [B, C, H, W]."""

    def __init__(
        self, model: nn.Module, scale: Tensor, shift: Tensor, layout: torch.memory_format
    ) -> None:
        self.model, self.scale, self.shift, self.layout = model, scale, shift, layout

    @torch.enable_grad()
    def gradient(self, pixels: Tensor, labels: Tensor) -> Tensor:
        pixels = pixels.detach().requires_grad_()
        inputs = (pixels * self.scale + self.shift).contiguous(memory_format=self.layout)
        loss = F.cross_entropy(logits_of(self.model(inputs)).flatten(1), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
        return gradient
