"""Make backdoored models to order, and attack purified ones."""

from .adversarial import mislead
from .attack_metrics import measure_attack, rating
from .attacks import RECIPES, attack_of, trigger_of
from .models import network
from .reattack import reactivate, retune
from .siba import find_siba
from .spec import Order
from .suspect_manifest import Suspect
from .suspect_store import SuspectStore
from .train import Attack, TrainSettings, train_suspect

__all__ = [
    "RECIPES",
    "Attack",
    "Order",
    "Suspect",
    "SuspectStore",
    "TrainSettings",
    "attack_of",
    "find_siba",
    "measure_attack",
    "mislead",
    "network",
    "rating",
    "reactivate",
    "retune",
    "train_suspect",
    "trigger_of",
]
