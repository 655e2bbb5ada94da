"""How long frames waited for their prediction: percentiles of any number of them in fixed memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_EDGES_S = np.geomspace(1e-5, 1e3, 1601)
"""Limits of the bins, seconds: each is 1.2 % wider than the one before."""

_LIMITS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


class Latency:
    """A histogram of times. One thread adds, others read."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(_EDGES_S) + 1, np.int64)
        self.sum_s = 0.0
        """Of all times."""

    def add(self, seconds: NDArray[np.float64]) -> None:
        """Count these times (n,)."""
        np.add.at(self._counts, np.searchsorted(_EDGES_S, seconds), 1)
        self.sum_s += float(seconds.sum())

    def percentile(self, q: float) -> float:
        """Seconds below which q percent of the times lie, to 1.2 %; NaN before the first."""
        below = np.cumsum(self._counts)
        if not below[-1]:
            return float("nan")
        found = int(np.searchsorted(below, q / 100 * below[-1]))
        return float(_EDGES_S[min(found, len(_EDGES_S) - 1)])

    def buckets(self) -> list[tuple[str, int]]:
        """How many times are at most so long, to 1.2 %, for a few limits in seconds, as text; `+Inf` for all."""
        below = np.cumsum(self._counts)
        found = [(f"{limit:g}", int(below[np.searchsorted(_EDGES_S, limit)])) for limit in _LIMITS_S]
        return [*found, ("+Inf", int(below[-1]))]
