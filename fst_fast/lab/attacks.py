"""Attacks by name: which trigger, how often, under which label, and how the victim is trained."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from .. import triggers
from ..triggers import Trigger
from ..triggers.poisoning import Prepare
from .train import Attack

# Every image that is not poisoned.
REST = math.inf
CLEAN = "none"


@dataclass(frozen=True)
class Recipe:
    """The way that an attack is carried out.

    Attributes:
        trigger: its name in ``triggers.ZOO``; None poisons nothing.
        settings: of the trigger.
        rate: the published share of poisoned images.
        relabel: as of :func:`fst_fast.triggers.poisoning.plan`.
        cover: images with the trigger's cover, as a multiple of the rate; REST is all others.
        negatives: images of :func:`~fst_fast.triggers.poisoning.poison`'s kind, likewise.
        crops: whether the victim's training crops and flips. A crop moves what is put on before
            it, which some attacks do not survive.
        epochs: of the victim's training.
        bypass: weight with which the training hides the backdoor; see fst_fast.lab.bypass.
        needs: what is worked out on a surrogate model beforehand: "pattern", "perturbation".
    """

    trigger: str | None
    rate: float = 0.1
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    relabel: str = "all-to-one"
    cover: float = 0.0
    negatives: float = 0.0
    crops: bool = True
    epochs: int = 10
    bypass: float = 0.0
    needs: str | None = None


# Settings are the zoo's defaults, which are the publications', where nothing else is said; rates
# are the papers', or BackdoorBench's 10 %.
RECIPES: dict[str, Recipe] = {
    CLEAN: Recipe(None, 0.0),
    # Two pixels from the border, so that no crop of the lab's cuts into it.
    "badnets": Recipe("badnets", settings=MappingProxyType({"margin": 2})),
    "blended": Recipe("blended"),
    # A rate of 10 % would be the whole target class of ten.
    "sig": Recipe("sig", 0.05, relabel="clean-label"),
    "ctrl": Recipe("ctrl", 0.05, relabel="clean-label"),
    "label-consistent": Recipe(
        "label-consistent", 0.05, relabel="clean-label", needs="perturbation"
    ),
    "wanet": Recipe("wanet", cover=2.0),
    # Benign images are turned by other angles, and nothing else moves them.
    "batt-rotation": Recipe("batt-rotation", 0.05, cover=REST, crops=False, epochs=15),
    # The authors crop and flip; in as few epochs as here that hides a pattern of few pixels.
    "siba": Recipe("siba", 0.01, crops=False, epochs=15, needs="pattern"),
    "low-frequency": Recipe("low-frequency"),
    "trojannn": Recipe("trojannn"),
    "ftrojan": Recipe("ftrojan"),
    "adaptive-blend": Recipe("adaptive-blend", 0.003, cover=1.0),
    "adaptive-patch": Recipe("adaptive-patch", 0.003, cover=2.0),
    "bpp": Recipe("bpp", negatives=1.0),
    "bypass": Recipe("badnets", settings=MappingProxyType({"margin": 2}), bypass=3.0),
}


def recipe_of(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: there is none; names near matches.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"take one of {', '.join(RECIPES)}"
        raise ValueError(f"lab: attack must be a known name, got {name!r}; {hint}")
    return RECIPES[name]


def trigger_of(
    name: str, settings: Mapping[str, Any] | None = None, pattern: Tensor | None = None
) -> Trigger | None:
    """The trigger of an attack; None of the one that poisons nothing.

    Args:
        name: of the attack.
        settings: in place of the recipe's, each by itself.
        pattern: [H, W, C] int16, of an attack whose pattern was found.
    Raises:
        ValueError: an unknown attack or setting, or a pattern is lacking.

    Example:
        >>> fst_fast.lab.trigger_of("badnets", {"size": 2})
        BadNets(size=2, value=255, corner='bottom-right', margin=2)
    """
    recipe = recipe_of(name)
    if recipe.trigger is None:
        if settings:
            raise ValueError(
                f"lab: trigger options must be left out for {name!r}, got {settings}: it has none"
            )
        return None
    given = {**recipe.settings, **(settings or {})}
    if recipe.needs == "pattern":
        if pattern is None:
            raise ValueError(f"lab: pattern must be given for {name!r}, got none; see find_siba")
        given["pattern"] = pattern
    return triggers.get(recipe.trigger, **given)


def attack_of(
    name: str,
    trigger: Trigger,
    rate: float,
    count: int,
    *,
    target: int = 0,
    relabel: str | None = None,
    prepare: Prepare | None = None,
) -> Attack:
    """The attack of this name on so many images, with its covers and negatives.

    Args:
        name: of the attack.
        trigger: of :func:`trigger_of`.
        rate: poisoned share; ``round(rate * count)`` must be one image or more.
        count: images of the training set.
        target: the attacker's class.
        relabel: in place of the recipe's.
        prepare: as of :func:`~fst_fast.triggers.poisoning.poison`.
    Raises:
        ValueError: a rate that poisons nothing.

    Example:
        >>> trigger = fst_fast.lab.trigger_of("wanet")
        >>> fst_fast.lab.attack_of("wanet", trigger, rate=0.1, count=100).cover
        0.2
    """
    recipe = recipe_of(name)
    if not 0 <= rate <= 1 or round(rate * count) < 1:
        raise ValueError(
            f"lab: rate must be in 0..1 and poison an image or more of {count}, got {rate}; use "
            f"{1 / max(1, count):.2g} or more, or the attack {CLEAN!r}"
        )
    rest = 1 - round(rate * count) / count
    return Attack(
        trigger,
        rate,
        target,
        cover=rest if recipe.cover == REST else recipe.cover * rate,
        relabel=relabel or recipe.relabel,
        negatives=recipe.negatives * rate,
        prepare=prepare,
        bypass=recipe.bypass,
    )
