"""Whether something grows: the slope of a series of samples, and what it may be at most."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Slope:
    """Growth in units a second, and the interval that holds it with `CONFIDENCE`."""

    per_s: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Return whether the interval holds zero."""
        return self.low <= 0 <= self.high


def slope(times_s: Sequence[float], values: Sequence[float]) -> Slope:
    """Return the median of the slopes between all pairs of samples (Theil-Sen).

    Unlike least squares, it is not moved by single high samples, such as a burst of connections.

    Raises:
        ValueError: fewer than 8 samples, which say nothing.
    """
    if len(values) < 8:
        raise ValueError(f"{len(values)} samples; a slope needs 8 at least")
    found = stats.theilslopes(np.asarray(values, float), np.asarray(times_s, float), CONFIDENCE)
    return Slope(float(found[0]), float(found[2]), float(found[3]))
