"""Poison a data set: which images carry a trigger, under which label, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import Trigger
from .plain_numbers import plain_number, whole_number

# Images that a trigger is put on at a time: some compute in float64.
CHUNK = 1024
RELABEL = ("all-to-one", "all-to-all", "clean-label")
# Told images [n, H, W, C] uint8 and their labels [n]: other images in their place.
Prepare = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Poisoning:
    """The fate of each of M images.

    Attributes:
        triggers: all that occur.
        trigger: [M] int32, the trigger of each image, -1 for none.
        labels: [M] int64, after poisoning.
        tiles: [M] int32, where the trigger is left out: see :meth:`Trigger.tiles`.
        mask: [M] bool, true where an image was poisoned; a cover image is not.
    """

    triggers: tuple[Trigger, ...]
    trigger: Tensor
    labels: Tensor
    tiles: Tensor
    mask: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """The images [M, H, W, C] uint8 as planned; an image's index is the key of its noise."""
        out = images.clone()
        rows = torch.nonzero(self.trigger >= 0).flatten()
        out[rows.to(images.device)] = self.on(images, rows)
        return out

    def on(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return those rows of :meth:`apply`, of [M, H, W, C] images."""
        out = images[rows.to(images.device)]
        for number, trigger in enumerate(self.triggers):
            where = torch.nonzero(self.trigger[rows] == number).flatten()
            for part in where.split(CHUNK):
                keys = rows[part]
                part = part.to(images.device)
                out[part] = trigger.apply(out[part], keys.to(images.device), self.tiles[keys])
        return out


def plan(
    labels: Tensor,
    trigger: Trigger | Sequence[Trigger],
    poisoned: str | float | Tensor,
    *,
    target: int = 0,
    relabel: str = "all-to-one",
    cover: float = 0.0,
    seed: int = 0,
    where: str = "poison",
) -> Poisoning:
    """Decide what happens to each image.

    Args:
        labels: [M] int64.
        trigger: one, or several of which each poisoned image draws one.
        poisoned: "all" triggers every image, with the trigger as it is at test time. A rate in
            0..1 poisons ``round(rate * M)`` images, drawn without replacement among those that
            ``relabel`` allows, and a bool mask [M] the given ones, both with what the attack uses
            in training (:meth:`Trigger.training`).
        target: the attacker's class.
        relabel: "all-to-one" gives poisoned images the target's label, and draws from other
            classes; "all-to-all" gives class y the label y + 1, and the last class 0;
            "clean-label" leaves the labels, and draws from the target class.
        cover: share of all images that carry a trigger and keep their label, of
            :meth:`Trigger.covers`.
        seed: of all draws.
        where: the function that errors name.
    Raises:
        ValueError: an argument differs from the above, or asks for more images than there are.
    """
    given = _given(trigger, where)
    labels = labels.cpu()
    target = _whole(target, labels, where)
    _check(given, relabel, cover, where)
    generator = torch.Generator().manual_seed(seed)
    mask = _poisoned(labels, poisoned, target, relabel, generator, where)
    at_test = isinstance(poisoned, str)
    shown = given if at_test else tuple(part for t in given for part in t.training())
    chosen = torch.full((len(labels),), -1, dtype=torch.int32)
    rows = torch.nonzero(mask).flatten()
    chosen[rows] = _spread(len(shown), len(rows), generator)
    covers = tuple(part for t in given for part in t.covers())
    if cover > 0:
        rows = _cover(mask, cover, covers, given, generator, where)
        chosen[rows] = len(shown) + _spread(len(covers), len(rows), generator)
        shown = (*shown, *covers)
    tiles = torch.zeros(len(labels), dtype=torch.int32)
    for number, part in enumerate(shown):
        rows = torch.nonzero(chosen == number).flatten()
        tiles[rows] = part.tiles(len(rows), generator)
    return Poisoning(shown, chosen, _relabel(labels, mask, target, relabel), tiles, mask)


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set.

    Attributes:
        images: [M, H, W, C] uint8.
        labels: [M] int64.
        mask: [M] bool, true where an image was poisoned.
    """

    images: Tensor
    labels: Tensor
    mask: Tensor


def poison(
    images: Tensor,
    labels: Tensor,
    trigger: Trigger | Sequence[Trigger],
    *,
    rate: float,
    target: int = 0,
    relabel: str = "all-to-one",
    cover: float = 0.0,
    negatives: float = 0.0,
    prepare: Prepare | None = None,
    seed: int = 0,
) -> Poisoned:
    """Poison a data set once, as an attacker does.

    All-to-one draws ``round(rate * M)`` images without replacement from those whose class is not
    the target. (BackdoorBench also draws from the target class, where the trigger changes no
    label.)

    Args:
        images: [M, H, W, C] uint8.
        labels: [M] int64.
        trigger, target, relabel, cover, seed: see :func:`plan`.
        rate: poisoned share of the whole set, in 0..1.
        negatives: share of all images that keep their label and get what the trigger changed in
            some other image (of BppAttack: its quantisation error).
        prepare: changes the images that are to be poisoned, before the trigger is put on.
    Raises:
        ValueError: a rate is outside 0..1 or asks for more images than there are.
    """
    if not 0 <= float(rate) <= 1:
        raise ValueError(f"poison: rate must lie in 0..1, got {rate}; give a share of the images")
    planned = plan(
        labels, trigger, float(rate), target=target, relabel=relabel, cover=cover, seed=seed
    )
    mask = planned.mask.to(images.device)
    if prepare is not None:
        prepared = images.clone()
        prepared[mask] = prepare(images[mask], labels.to(images.device)[mask])
        images = prepared
    poisoned = planned.apply(images)
    if negatives > 0:
        _add_negatives(poisoned, images, planned, negatives, seed)
    return Poisoned(poisoned, planned.labels.to(labels.device), mask.to(labels.device))


def _add_negatives(
    poisoned: Tensor, images: Tensor, planned: Poisoning, share: float, seed: int
) -> None:
    """Put other images' changes on images that the plan leaves alone, in place."""
    free = torch.nonzero(planned.trigger < 0).flatten()
    count = round(share * len(images))
    if count > len(free):
        raise ValueError(
            f"poison: negatives {share} ask for {count} images, but only {len(free)} carry no "
            f"trigger; use a share up to {len(free) / len(images):.3f}"
        )
    # Another stream than the plan's.
    generator = torch.Generator().manual_seed(seed + 1)
    rows = free[torch.randperm(len(free), generator=generator)[:count]].to(images.device)
    others = torch.randint(len(images), (count,), generator=generator).to(images.device)
    source = images[others]
    change = planned.triggers[0].apply(source).to(torch.int16) - source.to(torch.int16)
    poisoned[rows] = (images[rows].to(torch.int16) + change).clamp(0, 255).to(torch.uint8)


def _given(trigger: object, where: str) -> tuple[Trigger, ...]:
    if isinstance(trigger, Trigger):
        return (trigger,)
    given = tuple(trigger) if isinstance(trigger, list | tuple) else ()
    if not given or not all(isinstance(part, Trigger) for part in given):
        named = isinstance(trigger, str)
        remedy = f"fst_fast.triggers.get({trigger!r})" if named else "see fst_fast.triggers"
        raise ValueError(
            f"{where}: trigger must be a Trigger or several, got {trigger!r}; {remedy}"
        )
    return given


def _whole(target: object, labels: Tensor, where: str) -> int:
    """The target as an int that is one of the classes."""
    found = whole_number(target)
    most = int(labels.max()) if len(labels) else 0
    if found is None or found < 0 or (len(labels) and found > most):
        raise ValueError(f"{where}: target must be a class in 0..{most}, got {target!r}")
    return found


def _check(given: tuple[Trigger, ...], relabel: str, cover: float, where: str) -> None:
    if not isinstance(relabel, str) or relabel not in RELABEL:
        raise ValueError(f"{where}: relabel must be one of {', '.join(RELABEL)}, got {relabel!r}")
    share = plain_number(cover)
    if share is None or not 0 <= share <= 1:
        raise ValueError(f"{where}: cover must be a rate in 0..1, got {cover!r}")


def _poisoned(
    labels: Tensor,
    poisoned: str | float | Tensor,
    target: int,
    relabel: str,
    generator: torch.Generator,
    where: str,
) -> Tensor:
    """[M] bool."""
    if not isinstance(poisoned, str) and hasattr(poisoned, "shape") and len(poisoned.shape):
        poisoned = torch.as_tensor(poisoned)
    if isinstance(poisoned, Tensor):
        if poisoned.dtype != torch.bool or poisoned.shape != labels.shape:
            raise ValueError(
                f"{where}: poisoned must be a bool mask [{len(labels)}], one per image, got "
                f"{poisoned.dtype} {list(poisoned.shape)}"
            )
        return poisoned.cpu()
    if isinstance(poisoned, str) and poisoned == "all":
        return torch.ones_like(labels, dtype=torch.bool)
    rate = None if isinstance(poisoned, str) else plain_number(poisoned)
    if rate is None or not 0 <= rate <= 1:
        raise ValueError(
            f'{where}: poisoned must be "all", a rate that lies in 0..1, or a bool mask, got '
            f"{poisoned!r}"
        )
    allowed = {
        "all-to-one": (labels != target, f"not of class {target}"),
        "all-to-all": (torch.ones_like(labels, dtype=torch.bool), "there"),
        "clean-label": (labels == target, f"of class {target}"),
    }
    eligible, words = allowed[relabel]
    sources = torch.nonzero(eligible).flatten()
    count = round(rate * len(labels))
    if count > len(sources):
        raise ValueError(
            f"{where}: rate {rate} asks for {count} images, but only {len(sources)} are "
            f"{words}; use a rate up to {len(sources) / len(labels):.3f}"
        )
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[sources[torch.randperm(len(sources), generator=generator)[:count]]] = True
    return mask


def _cover(
    mask: Tensor,
    cover: float,
    covers: tuple[Trigger, ...],
    given: tuple[Trigger, ...],
    generator: torch.Generator,
    where: str,
) -> Tensor:
    """The images that carry a cover, all of them clean."""
    if not covers:
        names = ", ".join(type(trigger).__name__ for trigger in given)
        raise ValueError(f"{where}: cover must be 0 for {names}, which has none, got {cover}")
    clean = torch.nonzero(~mask).flatten()
    count = round(cover * len(mask))
    if count > len(clean):
        raise ValueError(
            f"{where}: cover {cover} asks for {count} images, but only {len(clean)} are not "
            f"poisoned; use a share up to {len(clean) / len(mask):.3f}"
        )
    return clean[torch.randperm(len(clean), generator=generator)[:count]]


def _spread(kinds: int, count: int, generator: torch.Generator) -> Tensor:
    """[count] int32 in 0..kinds-1; nothing is drawn where there is no choice."""
    if kinds < 2:
        return torch.zeros(count, dtype=torch.int32)
    return torch.randint(0, kinds, (count,), generator=generator, dtype=torch.int32)


def _relabel(labels: Tensor, mask: Tensor, target: int, relabel: str) -> Tensor:
    if relabel == "clean-label" or not len(labels):
        return labels.clone()
    classes = int(labels.max()) + 1
    new = torch.full_like(labels, target) if relabel == "all-to-one" else (labels + 1) % classes
    return torch.where(mask, new, labels)
