"""The best of many candidates, without a look at all of them each time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from steering.policies.interest import Cells

_AT_ONCE = 2**14
"""Candidates whose worth is computed anew in one go, about: what a suggestion costs does not grow with the field."""
_IN_TURN = 2**12
"""Candidates, about, whose turn comes each time though nothing near them has changed: what they are worth depends,
little by little, on all of the field. Of fewer candidates all are up to date each time."""


class Ranking:
    """What candidates are worth, and the best in each cell."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._low, self._high = cells.boxes()
        self._worth = np.full(len(cells.of), -1.0)
        self._top = np.full(len(cells.count), -1.0)
        self._first = np.zeros(len(cells.count), np.int64)
        """The first candidate of each cell that is worth as much as the best there."""
        self._stale = np.ones(len(cells.count), bool)
        self._turn = 0

    def outdate(self, cells: NDArray[np.int64] | slice) -> None:
        """What the candidates of these cells are worth has changed."""
        self._stale[cells] = True

    def due(self) -> NDArray[np.int64]:
        """Cells whose candidates are to be looked at again now, see `update`."""
        count = len(self._stale)
        share = -(-count * _IN_TURN // len(self._worth))
        self._stale[np.arange(self._turn, self._turn + min(share, count)) % count] = True
        found = np.flatnonzero(self._stale)
        found = np.roll(found, -int(np.searchsorted(found, self._turn)))
        found = found[np.cumsum(self._cells.count[found]) - self._cells.count[found] < _AT_ONCE]
        self._turn = (int(found[-1]) + 1) % count
        return found

    def update(self, cells: NDArray[np.int64], rows: NDArray[np.int64], worth: NDArray[np.float64]) -> None:
        """Take in what the candidates of these cells, `rows` as `Cells.members` gives them, are worth: (k,), below 0
        for those that are not to be chosen."""
        self._worth[rows] = worth
        self._stale[cells] = False
        count = self._cells.count[cells]
        start = np.cumsum(count) - count
        self._top[cells] = top = np.maximum.reduceat(worth, start)
        equal = np.where(worth == np.repeat(top, count), rows, len(self._worth))
        self._first[cells] = np.minimum.reduceat(equal, start)

    def best(
        self,
        farther: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
        here: NDArray[np.float64] | None = None,
        candidates: NDArray[np.float64] | None = None,
    ) -> int:
        """The candidate that is worth most, the first of those that are worth the same; -1 where none is to be chosen
        among those that were looked at.

        farther: by what the worth of positions (k, 2) is divided, 1 or more, and the more the farther they are from
        `here` along either axis; then `candidates` (n, 2) are wanted too.
        """
        if farther is None or here is None or candidates is None:
            most = self._top.max()
            return int(self._first[self._top == most].min()) if most >= 0 else -1
        bound = np.where(self._top >= 0, self._top / farther(np.clip(here, self._low, self._high)), -np.inf)
        best, row = 0.0, -1
        while bound[cell := int(bound.argmax())] >= best:
            rows = self._cells.members(np.array([cell]))
            gain = self._worth[rows] / farther(candidates[rows])
            k = int(gain.argmax())
            if row < 0 or gain[k] > best or (gain[k] == best and rows[k] < row):
                best, row = float(gain[k]), int(rows[k])
            bound[cell] = -np.inf
        return row
