"""Makes backdoored models to order; what one is needed for again is kept in a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..checkpoints import manifest
from ..checkpoints.atomic_files import dump_json, read_object, replace_file, strict_json
from ..data.image_sets import ImageSet
from ..triggers import Trigger
from ..triggers.poisoning import Prepare, plan
from . import suspect_manifest
from .adversarial import mislead
from .attacks import attack_of, trigger_of
from .siba import find_siba, pack_pattern, unpack_pattern
from .spec import Order
from .train import Attack, train_suspect

# SIBA's search keeps the paper's bounds, on fewer images and for fewer epochs.
SEARCH_IMAGES = 4_000
SEARCH = {"k": 100, "epsilon": 8, "batch_size": 500, "seed": 2}
SEARCH_EPOCHS = 60
PERTURBATION_STEPS = 100


@dataclass(frozen=True)
class Made:
    """A model in eval mode, and its manifest's fields."""

    model: nn.Module
    manifest: dict[str, Any]


class SuspectStore:
    """Makes models from one training set.

    Args:
        folder: for surrogates, patterns and what :meth:`get` makes; named after their contents, so
            that any number of orders share it.
        data: the clean training set.
        device: to train on.
        tell: called with a line about what is done.

    Example:
        >>> from pathlib import Path
        >>> from fst_fast.data.image_sets import ImageSet
        >>> images = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
        >>> data = ImageSet(images, torch.arange(8) % 2, ("cat", "dog"))
        >>> store = fst_fast.lab.SuspectStore(Path("suspects"), data, torch.device("cpu"))
        >>> store.check(fst_fast.lab.Order("badnets", arch="resnet8", rate=0.5))
    """

    def __init__(
        self,
        folder: Path,
        data: ImageSet,
        device: torch.device,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.data, self.device, self.tell = folder, data, device, tell
        self.facts = data.describe()

    def get(self, order: Order) -> Made:
        """The model, from the folder where it is there."""
        path = self.folder / f"{order.name(self.facts)}.safetensors"
        if path.exists():
            network = order.network
            classes = len(self.data.classes)
            model = checkpoints.load(path, network.arch, classes, **network.options)
            facts = manifest.check(path).facts
            if facts is not None:
                return Made(model, facts)
        made = self.make(order)
        self.folder.mkdir(parents=True, exist_ok=True)
        return Made(made.model, checkpoints.save(path, made.model, made.manifest))

    def check(self, order: Order) -> None:
        """Refuse, before any training, what this order asks too much of.

        Raises:
            ValueError: an architecture that no library knows, a trigger or its options that do not
                fit the images, or a rate that these labels do not allow.
        """
        with torch.random.fork_rng(devices=[]):
            order.network.build(len(self.data.classes))
        pattern = None
        if order.recipe.needs == "pattern":
            pattern = torch.zeros(self.data.images.shape[1:], dtype=torch.int16)
        trigger = trigger_of(order.attack, order.options, pattern)
        if trigger is not None:
            trigger.apply(self.data.images[:1])
            attack = self._attack(order, trigger, None)
            plan(
                self.data.labels,
                trigger,
                attack.rate,
                target=attack.target,
                relabel=attack.relabel,
                cover=attack.cover,
                where=f"lab: {order.attack}",
            )

    def make(self, order: Order) -> Made:
        """Poison the images as ordered, and train on them."""
        pattern = self._pattern(order) if order.recipe.needs == "pattern" else None
        prepare = self._perturbation(order) if order.recipe.needs == "perturbation" else None
        trigger = trigger_of(order.attack, order.options, pattern)
        attack = None if trigger is None else self._attack(order, trigger, prepare)
        title = order.attack if attack is None else f"{order.attack} {100 * attack.rate:g} %"
        model, seconds = train_suspect(
            lambda: order.network.build(len(self.data.classes)),
            self.data,
            attack,
            order.training,
            normalize=order.normalization,
            augment=order.augment,
            batch_size=min(order.batch_size, len(self.data)),
            seed=order.seed,
            device=self.device,
            on_epoch=lambda epoch, loss, seconds: self.tell(
                f"{title}: epoch {epoch}/{order.epochs} loss {loss:.3f} {seconds:.0f} s"
            ),
        )
        fields = suspect_manifest.fields_of(order, self.facts, attack, pattern)
        done = {"seconds": seconds, "device": str(self.device), "threads": torch.get_num_threads()}
        return Made(model, {**fields, "trained": done, "versions": checkpoints.versions()})

    def _attack(self, order: Order, trigger: Trigger, prepare: Prepare | None) -> Attack:
        assert order.rate is not None
        return attack_of(
            order.attack,
            trigger,
            order.rate,
            len(self.data),
            target=order.target,
            relabel=order.relabel,
            prepare=prepare,
        )

    def _pattern(self, order: Order) -> Tensor:
        """SIBA's, found once for a surrogate and a target."""
        surrogate, epochs = order.surrogate(), order.search or SEARCH_EPOCHS
        name = f"pattern-{order.target}-{epochs}-{surrogate.name(self.facts)}.json"
        path = self.folder / name
        if path.exists():
            kept = _kept(path)
            try:
                return unpack_pattern(kept)
            except ValueError as error:
                raise ValueError(f"{error}; delete {path} to find it anew") from None
        chosen = self.data.split(min(SEARCH_IMAGES, len(self.data)), seed=order.seed)[0]
        found = find_siba(
            self.get(surrogate).model,
            chosen.images,
            target=order.target,
            epochs=epochs,
            normalize=order.normalization,
            precision=order.precision,
            device=self.device,
            on_epoch=lambda epoch, loss, seconds: self.tell(
                f"pattern: epoch {epoch}/{epochs} loss {loss:.3f} {seconds:.0f} s"
            ),
            **SEARCH,
        )
        packed = {**pack_pattern(found.pattern), "loss": found.loss, "history": found.history}
        replace_file(path, dump_json(strict_json(packed, "pattern")))
        return found.pattern

    def _perturbation(self, order: Order) -> Prepare:
        surrogate, steps = self.get(order.surrogate()).model, order.search or PERTURBATION_STEPS

        def prepare(images: Tensor, labels: Tensor) -> Tensor:
            self.tell(f"{order.attack}: {len(images)} images are made hard to learn")
            return mislead(
                surrogate,
                images,
                labels,
                normalize=order.normalization,
                steps=steps,
                device=self.device,
            )

        return prepare


def _kept(path: Path) -> dict[str, Any]:
    """Return what a file of the folder holds."""
    found = read_object(path)
    if found is None:
        raise ValueError(f"lab: {path} must be as it was written, got a damaged file; delete it")
    return found
