"""The measurements of a report: numbers and pictures, no models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Observed:
    """One model's answers on the test images.

    Attributes:
        labels: [N] int64.
        clean: [N] int64, the predicted class of each image.
        triggered: [N] int64, of the same images with the trigger on; None where none was given.
    """

    labels: np.ndarray
    clean: np.ndarray
    triggered: np.ndarray | None


@dataclass(frozen=True)
class Samples:
    """A few of the test images.

    Attributes:
        clean: [n, H, W, C] uint8, as stored.
        triggered: the same with the trigger on; None where none was given.
        before, after: what the models said of them; ``before`` None without the suspect.
    """

    clean: np.ndarray
    triggered: np.ndarray | None
    before: Observed | None
    after: Observed


@dataclass(frozen=True)
class Measured:
    """The answers of the models on the test images.

    Attributes:
        before: the suspect's answers; None where it was not given.
        after: the purified model's answers.
        samples: some of the images; None where they cannot be turned back into pixels.
        trigger: the trigger's name and settings; None where none was given.
        target: the attacker's class.
        device, precision: of the measurement.
    """

    before: Observed | None
    after: Observed
    samples: Samples | None
    trigger: Mapping[str, object] | None
    target: int
    device: str
    precision: str
