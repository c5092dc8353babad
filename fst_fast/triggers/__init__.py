"""Backdoor triggers as small frozen descriptions; ``trigger.apply(images_u8)`` is the truth."""

from .adaptive import AdaptiveBlend, AdaptivePatch
from .additive import SIBA, SIG, LabelConsistent, LowFrequency, TrojanNN
from .affine import BadNets, Blended
from .base import Chroma, Elementwise, Gather, Trigger, Warp, WarpField
from .frequency import CTRL, FTrojan
from .generated import InputAware
from .lower import looked_up, lower
from .patterns import AddedPattern, MaskedPattern
from .quantise import BppAttack, BppAttackDithered
from .reflection import Refool
from .stored import SSBA, PoisonInk, Stored
from .warp import BattRotation, BattTranslation, WaNet

ZOO: dict[str, type[Trigger]] = {
    "badnets": BadNets,
    "blended": Blended,
    "sig": SIG,
    "low-frequency": LowFrequency,
    "trojannn": TrojanNN,
    "label-consistent": LabelConsistent,
    "adaptive-blend": AdaptiveBlend,
    "adaptive-patch": AdaptivePatch,
    "ctrl": CTRL,
    "ftrojan": FTrojan,
    "siba": SIBA,
    "bpp": BppAttack,
    "bpp-dithered": BppAttackDithered,
    "wanet": WaNet,
    "batt-rotation": BattRotation,
    "batt-translation": BattTranslation,
    "refool": Refool,
    "input-aware": InputAware,
    "ssba": SSBA,
    "poison-ink": PoisonInk,
}


def get(name: str, **settings: object) -> Trigger:
    """The trigger of this name in :data:`ZOO`, with the given settings.

    Raises:
        ValueError: unknown name or setting.

    Example:
        >>> fst_fast.triggers.get("badnets", size=2)
        BadNets(size=2, value=255, corner='bottom-right', margin=0)
    """
    if not isinstance(name, str) or name not in ZOO:
        raise ValueError(f"triggers: name must be one of {sorted(ZOO)}, got {name!r}")
    try:
        return ZOO[name](**settings)
    except TypeError as error:
        raise ValueError(f"triggers: {name} does not take {settings}: {error}") from None


__all__ = [
    "CTRL",
    "SIBA",
    "SIG",
    "SSBA",
    "ZOO",
    "AdaptiveBlend",
    "AdaptivePatch",
    "AddedPattern",
    "BadNets",
    "BattRotation",
    "BattTranslation",
    "Blended",
    "BppAttack",
    "BppAttackDithered",
    "Chroma",
    "Elementwise",
    "FTrojan",
    "Gather",
    "InputAware",
    "LabelConsistent",
    "LowFrequency",
    "MaskedPattern",
    "PoisonInk",
    "Refool",
    "Stored",
    "Trigger",
    "TrojanNN",
    "WaNet",
    "Warp",
    "WarpField",
    "get",
    "looked_up",
    "lower",
]
