"""Backdoor triggers as small frozen descriptions; ``trigger.apply(images_u8)`` is the truth."""

from .affine import BadNets, Blended
from .base import Trigger

ZOO: dict[str, type[Trigger]] = {"badnets": BadNets, "blended": Blended}


def get(name: str, **settings: object) -> Trigger:
    """The trigger of this name in :data:`ZOO`, with the given settings.

    Raises:
        ValueError: unknown name or setting.
    """
    if name not in ZOO:
        raise ValueError(f"triggers: name must be one of {sorted(ZOO)}, got {name!r}")
    try:
        return ZOO[name](**settings)
    except TypeError as error:
        raise ValueError(f"triggers: {name} does not take {settings}: {error}") from None


__all__ = ["ZOO", "BadNets", "Blended", "Trigger", "get"]
