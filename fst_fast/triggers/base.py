"""What a trigger is: a fixed, described change of stored pixels."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Trigger:
    """Base of every trigger: a frozen description with one method, :meth:`apply`.

    A trigger acts on stored bytes, before cropping, flipping and normalisation, because that is
    where an attacker acts.
    """

    def apply(self, images: Tensor) -> Tensor:
        """Return triggered copies of the images.

        Args:
            images: [N, H, W, C] uint8, any device.
        Returns:
            [N, H, W, C] uint8, a new tensor on the same device.
        Raises:
            ValueError: wrong dtype or rank, or the trigger does not fit the images.
        """
        check_images(images, type(self).__name__)
        return self._apply(images)

    def _apply(self, images: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define _apply")

    def describe(self) -> dict[str, object]:
        """Name and settings as plain JSON values, for manifests; tensors become their shapes."""
        settings = {
            name: f"tensor {list(value.shape)}" if isinstance(value, Tensor) else value
            for name, value in asdict(self).items()
        }
        return {"name": type(self).__name__, **settings}


def check_images(images: Tensor, name: str) -> None:
    """Raise ValueError unless images is a uint8 tensor [N, H, W, C]."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        got = (
            f"{images.dtype} {list(images.shape)}"
            if isinstance(images, Tensor)
            else type(images).__name__
        )
        raise ValueError(
            f"{name}: images must be a uint8 tensor [N, H, W, C], got {got}; for floats in 0..1 "
            "use (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)"
        )
    if images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name}: images must be [N, H, W, C] with C in 1, 3, 4, got {list(images.shape)}; "
            "for [N, C, H, W] use images.permute(0, 2, 3, 1)"
        )
