"""The time that moving the stage takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Travel:
    """The time that a stage takes from one position to the next, in which no light is used.

    The two axes move at once, each at the same constant speed, and then the stage settles.
    """

    velocity: float
    """Of each axis, geometry.length_unit per second."""
    settling: float = 0.0
    """Seconds from the arrival at a position until it may be measured; a stage that stays does not settle."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.velocity) and self.velocity > 0 and np.isfinite(self.settling) and self.settling >= 0):
            raise ValueError(
                f"found velocity={self.velocity}, settling={self.settling}, "
                "expected a positive speed in length units per second, and 0 or more seconds"
            )

    def seconds(self, start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds from start to end, (..., 2) of (y, x) each, broadcast together; returns (...)."""
        distance = np.abs(np.asarray(end, np.float64) - start).max(-1)
        return distance / self.velocity + np.where(distance > 0, self.settling, 0.0)

    def along(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) seconds to each of n positions (n, 2) from the one before; 0 for the first."""
        where = np.asarray(positions, np.float64).reshape(-1, 2)
        return np.concatenate([np.zeros(min(len(where), 1)), self.seconds(where[:-1], where[1:])])
