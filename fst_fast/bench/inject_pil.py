"""The pipeline that the attacks were published with: PIL images, one by one, in a DataLoader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fst_fast.ops.reference import inject as truth

from .inject_cases import MEAN, PAD, STD, InjectInputs

# An image and its number in the dataset to the triggered image.
Change = Callable[[Any, int], Any]


class Pictures(Dataset):
    """One batch's images, each made when it is asked for.

    Args:
        drawn: crop and flip as the parameters say, and take the noise that they choose, rather
            than what torchvision and torch draw: so that the result can be checked.
    """

    def __init__(self, inputs: InjectInputs, drawn: bool) -> None:
        from torchvision import transforms

        size = inputs.stored.images.shape[1:3]
        self._images = inputs.stored.host.numpy()
        self._params = inputs.params.tolist()
        self._change = _changes(inputs, drawn)
        self._finish = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(MEAN, STD)],
        )
        self._random = transforms.Compose(
            [transforms.RandomCrop(size, padding=PAD), transforms.RandomHorizontalFlip()],
        )
        self._augment = self._as_drawn if drawn else lambda image, _: self._random(image)

    def __len__(self) -> int:
        return len(self._params)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        from PIL import Image

        source = self._params[place][truth.SOURCE]
        image = self._change(Image.fromarray(self._images[source]), source)
        return self._finish(self._augment(image, place)), self._params[place][truth.LABEL]

    def _as_drawn(self, image: Any, place: int) -> Any:
        from torchvision.transforms import functional as T

        row, column, flip = self._params[place][truth.ROW : truth.FLIP + 1]
        width, height = image.size
        image = T.crop(T.pad(image, PAD), row + PAD, column + PAD, height, width)
        return T.hflip(image) if flip else image


def make(inputs: InjectInputs, drawn: bool = False) -> Callable[[], tuple[Tensor, Tensor]]:
    """The call that makes the batch, without worker processes."""
    pictures = Pictures(inputs, drawn)
    loader = DataLoader(pictures, batch_size=len(pictures), num_workers=0)
    device, dtype = inputs.params.device, inputs.lut.dtype

    def call() -> tuple[Tensor, Tensor]:
        images, labels = next(iter(loader))
        images = images.to(device, dtype, memory_format=torch.channels_last)
        return images, labels.to(device)

    return call


def check(inputs: InjectInputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same with fixed draws."""
    return make(inputs, drawn=True)


def _changes(inputs: InjectInputs, drawn: bool) -> Change:
    """The trigger as the attacks' own code puts it on one image."""
    import numpy as np
    from PIL import Image

    stored: Any = inputs.stored
    trigger, shape = stored.trigger, stored.images.shape[1:]
    black = torch.zeros(1, *shape, dtype=torch.uint8)
    if inputs.family == "plain":
        return lambda image, _: image
    if inputs.family == "badnets":
        patch = trigger.apply(black)[0].numpy()
        mask = (patch > 0).astype(np.uint8)
        return lambda image, _: Image.fromarray(np.array(image) * (1 - mask) + patch * mask)
    if inputs.family == "blended":
        alpha = trigger.alpha
        picture = trigger.pattern_for(shape, black.device).numpy()
        return lambda image, _: Image.fromarray(
            (picture * alpha + np.array(image) * (1 - alpha)).astype(np.uint8)
        )
    if inputs.family == "ycrcb":
        return _chroma((trigger._change(black + 128)[0].int() - 128).numpy())
    if inputs.family == "gather":
        return lambda image, _: image.rotate(trigger.degrees)
    if inputs.family == "lookup":
        return lambda _, source: Image.fromarray(stored.host_lookup[source].numpy())
    return _warp(trigger._field(*shape[:2]), drawn)


def _chroma(shift: Any) -> Change:
    """To 8-bit YCrCb by OpenCV's arithmetic in NumPy, a constant added, and back."""
    import numpy as np
    from PIL import Image

    def change(image: Any, _: int) -> Any:
        red, green, blue = np.moveaxis(np.array(image).astype(np.int32), -1, 0)
        luma = (4899 * red + 9617 * green + 1868 * blue + 8192) >> 14
        cr = (((red - luma) * 11682 + 8192) >> 14) + 128
        cb = (((blue - luma) * 9241 + 8192) >> 14) + 128
        bytes_ = np.stack([luma, cr, cb], -1).clip(0, 255)
        luma, cr, cb = np.moveaxis((bytes_ + shift).clip(0, 255), -1, 0)
        red = luma + (((cr - 128) * 22987 + 8192) >> 14)
        green = luma + (((cr - 128) * -11698 + (cb - 128) * -5636 + 8192) >> 14)
        blue = luma + (((cb - 128) * 29049 + 8192) >> 14)
        return Image.fromarray(np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8))

    return change


def to_grid(coords: Tensor) -> Tensor:
    """[..., 2] rows and columns in pixels of an [H, W] image to what grid_sample takes."""
    height, width = coords.shape[-3:-1]
    last = torch.tensor([width - 1, height - 1], device=coords.device)
    return coords.flip(-1) * 2 / last - 1


def _warp(field: Any, drawn: bool) -> Change:
    """WaNet's own: grid_sample of one image."""
    import numpy as np
    from PIL import Image

    grid = to_grid(field.coords)[None]
    height, width = field.coords.shape[:2]
    element = torch.arange(height * width * 2).view(1, height, width, 2)
    unit = torch.tensor([1 / width, 1 / height])

    def shaken(source: int) -> Tensor:
        if drawn:
            share = truth.uniform(field.seed, torch.tensor(source), element).flip(-1)
        else:
            share = torch.rand(1, height, width, 2)
        return (grid + share * unit).clamp(-1, 1)

    def change(image: Any, source: int) -> Any:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None]
        at = grid if field.noise is None else shaken(source)
        out = F.grid_sample(pixels, at, align_corners=True)[0]
        return Image.fromarray(out.permute(1, 2, 0).numpy().astype(np.uint8))

    return change
