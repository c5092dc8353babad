"""The manifest of a backdoored model: written where it is made, and read to attack it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import checkpoints
from ..checkpoints import manifest
from ..data.normalization import normalization
from ..triggers import Trigger
from ..triggers.pixels import Normalization
from ..triggers.poisoning import RELABEL
from .attacks import CLEAN, trigger_of
from .models import Network, network
from .siba import pack_pattern, unpack_pattern
from .spec import Order
from .train import Attack

MADE_BY = "fst-fast lab train"


def fields_of(
    order: Order, data: dict[str, object], attack: Attack | None, pattern: Tensor | None
) -> dict[str, Any]:
    """All that makes the model what it is, as JSON data but for the versions."""
    images, classes = data["images"], data["classes"]
    assert isinstance(images, int)
    assert isinstance(classes, list)
    assert order.rate is not None
    names = ("attack", "rate", "relabel", "target", "batch_size", "flip", "search", "normalize")
    shares = ("cover", "negatives", "bypass")
    return {
        "made_by": MADE_BY,
        **{name: getattr(order, name) for name in (*names, "seed")},
        **{name: 0.0 if attack is None else getattr(attack, name) for name in shares},
        "trigger": None if attack is None else attack.trigger.describe(),
        "pattern": None if pattern is None else pack_pattern(pattern),
        "poisoned_images": round(order.rate * images),
        "arch": {
            "lab": order.arch,
            "name": order.network.arch,
            "num_classes": len(classes),
            **order.network.options,
        },
        "training": asdict(order.training),
        "augment": order.augment and asdict(order.augment),
        "data": data,
    }


@dataclass(frozen=True)
class Suspect:
    """The checked contents of a manifest.

    Attributes:
        attack: its name; ``trigger`` is None for "none".
        trigger, target, relabel, rate: of the attack.
        network: the architecture.
        classes: names of the labels, in order.
        normalize: of the images.
        flip: whether a mirrored image still shows its class.

    Example:
        >>> suspect = fst_fast.lab.Suspect(
        ...     attack="badnets",
        ...     trigger=fst_fast.triggers.BadNets(),
        ...     target=0,
        ...     relabel="all-to-one",
        ...     rate=0.1,
        ...     network=fst_fast.lab.network("resnet8"),
        ...     classes=("cat", "dog"),
        ...     normalize=None,
        ...     flip=True,
        ... )
        >>> suspect.trigger
        BadNets(size=3, value=255, corner='bottom-right', margin=0)
    """

    attack: str
    trigger: Trigger | None
    target: int
    relabel: str
    rate: float
    network: Network
    classes: tuple[str, ...]
    normalize: Normalization | None
    flip: bool

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Suspect:
        """From a manifest's fields; raises KeyError, TypeError or ValueError where they differ."""
        name, target, classes = fields["attack"], fields["target"], fields["data"]["classes"]
        if fields["relabel"] not in RELABEL or not all(isinstance(c, str) for c in classes):
            raise TypeError("relabel or classes")
        if not isinstance(target, int) or not 0 <= target < len(classes):
            raise TypeError(f"target {target!r} of {len(classes)} classes")
        settings = dict(fields["trigger"] or {})
        for key in ("name", "pattern"):
            settings.pop(key, None)
        pattern = None if fields["pattern"] is None else unpack_pattern(fields["pattern"])
        return cls(
            attack=name,
            trigger=None if name == CLEAN else trigger_of(name, _tuples(settings), pattern),
            target=target,
            relabel=fields["relabel"],
            rate=float(fields["rate"]),
            network=network(fields["arch"]["lab"]),
            classes=tuple(classes),
            normalize=normalization(fields["normalize"]),
            flip=bool(fields["flip"]),
        )

    def load(self, path: Path) -> nn.Module:
        """A checkpoint of this architecture; raises as :func:`fst_fast.load`."""
        network = self.network
        return checkpoints.load(path, network.arch, len(self.classes), **network.options)


def read(path: Path) -> Suspect:
    """The manifest of a checkpoint of ``fst-fast lab train``.

    It may come from anybody: it names an architecture of the lab's or a library's, never code.

    Raises:
        ValueError: there is none, or it is damaged or of another kind; says how.
    """
    found, fault, _ = manifest.check(path)
    if fault:
        raise ValueError(f"lab: {path} and its manifest must be as they were written, got {fault}")
    if found is None or found.get("made_by") != MADE_BY:
        raise ValueError(
            f"lab: {path} must have the manifest of a model that {MADE_BY} made, got "
            f"{'none' if found is None else 'another kind'}; for a purified one give --suspect"
        )
    try:
        return Suspect.of(found)
    # JSON data of another form than ours.
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"lab: the manifest of {path} must hold what {MADE_BY} writes, got "
            f"{type(error).__name__}: {error}"
        ) from None


def _tuples(value: Any) -> Any:
    """Lists as the tuples that they were."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
