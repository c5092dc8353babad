"""FST as its official script runs it: the baseline of the suites ``loop`` and ``evaluate``.

Its habits are kept: PIL images through a DataLoader without workers, float32, contiguous, the loss
and the number correct fetched at every step, the projection through a new tensor; and in the
evaluation two numbers fetched for every image. What it does by ``eval`` and ``exec`` of strings is
written out here, and its random draws are fixed where a result is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fst_fast.data.augment import Augment
from fst_fast.data.batches import autocast
from fst_fast.data.image_sets import ImageSet
from fst_fast.heads.find import logits_of
from fst_fast.methods.base import HeadState
from fst_fast.triggers import Trigger
from fst_fast.triggers.pixels import Normalization

Change = Callable[[Any], Any]


class Pictures(Dataset):
    """PIL images, each transformed when it is asked for."""

    def __init__(
        self,
        data: ImageSet,
        normalize: Normalization,
        augment: Augment | None = None,
        change: Change | None = None,
    ) -> None:
        from torchvision import transforms

        size = data.images.shape[1:3]
        moved: list[Any] = []
        if augment is not None:
            moved = [transforms.RandomCrop(size, padding=augment.pad)]
            moved += [transforms.RandomHorizontalFlip()] if augment.flip else []
        fixed = [transforms.ToTensor(), transforms.Normalize(*normalize)]
        self._images = data.images.numpy()
        self._labels = data.labels.tolist()
        self._change = change
        self._transform = transforms.Compose([*moved, *fixed])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = Image.fromarray(self._images[index])
        if self._change is not None:
            image = self._change(image)
        return self._transform(image), self._labels[index]


def pil_trigger(trigger: Trigger) -> Change:
    """The trigger on one PIL image."""
    import numpy as np
    from PIL import Image

    def change(image: Any) -> Any:
        pixels = torch.from_numpy(np.array(image))[None]
        return Image.fromarray(trigger.apply(pixels)[0].numpy())

    return change


def tune(
    model: nn.Module,
    head: nn.Linear,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    *,
    alpha: float,
    lr: float,
    epochs: int,
    seed: int,
    syncs: bool,
    precision: str = "fp32",
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    """FST in place by ordinary PyTorch.

    Args:
        syncs: fetch the loss and the number correct at every step.
    """
    state = HeadState(head)
    state.reinitialize(torch.Generator().manual_seed(seed))
    # The weight is not detached: as in the script, every projection records a little graph.
    norm = torch.norm(state.weight0.clone().requires_grad_())
    model.to(device).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        model.train()
        total = correct = 0.0
        for images, labels in loader:
            images = images.to(device, memory_format=layout)
            labels = labels.to(device)
            with autocast(device, precision):
                logits = logits_of(model(images))
            loss = F.cross_entropy(logits.float(), labels)
            loss = loss + alpha * torch.sum(head.weight * state.weight0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            head.weight.data = (head.weight * norm / head.weight.norm()).data
            if syncs:
                total += loss.item() * len(labels)
                correct += (logits.argmax(1) == labels).sum().item()
        schedule.step()


def counts(
    model: nn.Module, loader: DataLoader, device: torch.device, target: int | None = None
) -> tuple[int, int]:
    """Count the images classified as their label, or as the target, and all images.

    Images of the target class are left out where there is one.
    """
    model.eval()
    right: list[int] = []
    labels_seen: list[int] = []
    with torch.no_grad():
        for images, labels in loader:
            predicted = logits_of(model(images.to(device))).argmax(1)
            labels = labels.to(device)
            wanted = labels if target is None else torch.full_like(labels, target)
            for hit, label in zip(predicted == wanted, labels, strict=True):
                if hit and label.item() != target:
                    right.append(label.item())
                labels_seen.append(label.item())
    return len(right), sum(label != target for label in labels_seen)
