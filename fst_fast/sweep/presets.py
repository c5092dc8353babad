"""Which cells a table of evidence has."""

from __future__ import annotations

from dataclasses import dataclass

# Every table has these: nothing done, the baselines, FST with the paper's alpha for CIFAR-10, FST
# held at a cosine, and what alpha="auto" runs.
METHODS = ("none", "ft", "ft_init", "fe", "lp", "fst:0.2", "fst_auto", "fst:auto")
# (attack, rate, architecture) on which fst_auto was worked out: docs/alpha.md.
DEVELOPED = {("badnets", 0.01, "resnet18:16"), ("blended", 0.01, "resnet18:16")}


@dataclass(frozen=True)
class Preset:
    """A table's size.

    Attributes:
        attacks, rates: each attack at each of these shares of poisoned images; a clean model
            comes beside them.
        arch: of all models.
        seeds: how many, of each purification.
        train_images, test_images: how many at most; None takes all.
        clean_images: that the defender has, drawn from the training images as they were.
        train_epochs: None takes each attack's own.
        batch_size: of training and tuning.
        epochs: of tuning; FST auto makes four times as many.
    """

    attacks: tuple[str, ...]
    rates: tuple[float, ...]
    arch: str
    seeds: int
    clean_images: int
    train_images: int | None = None
    test_images: int | None = None
    train_epochs: int | None = None
    batch_size: int = 128
    epochs: int = 10


PRESETS = {
    # Ten minutes on two slow cores, so of attacks that so few images are enough for.
    "small": Preset(
        attacks=("badnets", "blended", "batt-rotation"),
        rates=(0.05,),
        arch="resnet8:8",
        seeds=1,
        clean_images=400,
        train_images=1_400,
        test_images=400,
        train_epochs=20,
        batch_size=64,
        epochs=15,
    ),
    # Three hours on two cores with AVX-512.
    "full": Preset(
        attacks=("badnets", "blended", "sig", "wanet", "batt-rotation", "siba"),
        rates=(0.05, 0.01, 0.005),
        arch="resnet18:16",
        seeds=3,
        clean_images=1_000,
        train_images=15_000,
        test_images=2_000,
    ),
}
