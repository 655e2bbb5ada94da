"""Each next position as far as possible from all before it: the field is covered coarsely first, then finer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steering.policies.candidates import Ordered, checked
from steering.policies.dwell import DwellRule
from steering.policies.stop import StopRule

SPACE_FILLING = "space-filling: as far as possible from all positions before"
"""The reason for a position."""


class SpaceFilling(Ordered):
    """Farthest-point order of the candidates, from the one nearest to their middle.

    Source: Gonzalez, "Clustering to minimize the maximum intercluster distance", Theor. Comput. Sci. 38, 293 (1985).
    Whenever the scan ends, the largest hole is at most twice as wide as the best choice of as many points allows.
    """

    def __init__(
        self, candidates: NDArray[np.float64], *, stop: StopRule | None = None, dwell: DwellRule | None = None
    ) -> None:
        where = checked(candidates)
        super().__init__(where, farthest_first(where), SPACE_FILLING, stop=stop, dwell=dwell)


def farthest_first(where: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n,) order of positions (n, 2): each the farthest from all before it, the first the nearest to their middle."""
    order = np.empty(len(where), np.int64)
    order[0] = np.argmin(((where - where.mean(0)) ** 2).sum(1))
    hole = ((where - where[order[0]]) ** 2).sum(1)
    hole[order[0]] = -1
    for i in range(1, len(where)):
        order[i] = np.argmax(hole)
        np.minimum(hole, ((where - where[order[i]]) ** 2).sum(1), out=hole)
        # -1 marks what is taken, so that candidates at the same place are each visited once.
        hole[order[i]] = -1
    return order
