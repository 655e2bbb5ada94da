"""The bookkeeping that every policy shares: which candidates are still to be measured in the scan at hand."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steering.records import Decision, Prediction


class Policy(Protocol):
    """The contract of the plug."""

    def ingest(self, prediction: Prediction, live: Any) -> None:
        """Take in what was predicted of the newest frames (positions in object pixels), and the live image as it is
        now: an xarray.Dataset of amplitude, phase and weight over (y, x), coordinates in the length unit."""

    def suggest(self, n: int) -> Decision:
        """Up to n positions to measure next, each with its reason; stop=True when these are the scan's last.

        Asked again after a stop, it begins the next scan: the source has gone on to another sample.
        """


class Ordered:
    """Walks once through the candidates of a scan, in an order that is fixed beforehand, and again for a new scan.

    A scan is new when this policy has stopped the one before it, or when the source says so: predictions come under
    another name. The two may be the same scan, and predictions come late; a walk that was begun ahead of its scan's
    first prediction is not begun again.
    """

    def __init__(self, candidates: NDArray[np.float64], order: NDArray[np.int64], reason: str) -> None:
        self._candidates = candidates
        self._order = order
        self._reason = reason
        self._next = 0
        self._suggested_before = 0
        """Positions of all walks before this one."""
        self._measured = 0
        """Frames predicted so far: more than the walks before had positions means that this walk is being measured."""
        self._scan: str | None = None

    def ingest(self, prediction: Prediction, live: Any) -> None:
        """A prediction of another scan starts the walk anew, unless none of this walk has been measured yet."""
        if self._scan not in (None, prediction.scan) and self._measured > self._suggested_before:
            self._begin()
        self._scan = prediction.scan
        self._measured += len(prediction.frame_id)

    def suggest(self, n: int) -> Decision:
        """The next n candidates of the order; the last ones come with stop=True, and after them a new walk begins."""
        if n < 1:
            raise ValueError(f"found a wish for {n} positions, expected 1 or more")
        if self._next == len(self._order):
            self._begin()
        chosen = self._order[self._next : self._next + n]
        total = len(self._order)
        reasons = [f"{self._reason}, {self._next + i + 1} of {total}" for i in range(len(chosen))]
        self._next += len(chosen)
        return Decision(positions=self._candidates[chosen], reasons=tuple(reasons), stop=self._next == total)

    def _begin(self) -> None:
        self._suggested_before += self._next
        self._next = 0


def checked(candidates: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 2) float64 candidates, refused when empty or not finite."""
    where = np.array(candidates, np.float64)
    if where.ndim != 2 or where.shape[1] != 2 or not len(where) or not np.isfinite(where).all():
        raise ValueError(f"found candidates of shape {where.shape}, expected (n, 2) finite (y, x), n of 1 or more")
    return where
