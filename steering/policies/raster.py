"""Row by row: the usual scan of a beamline."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steering.policies.candidates import Ordered, checked
from steering.policies.dwell import DwellRule
from steering.policies.stop import StopRule


class Raster(Ordered):
    """Rows from low to high y, each in turn from left to right and from right to left, so that the stage never jumps.

    candidates: (n, 2) of (y, x). rows: equally spaced lines from the lowest y to the highest; a candidate off a line
    belongs to the nearest one. By default as many as a grid of equal steps over the same rectangle would have.
    """

    def __init__(
        self,
        candidates: NDArray[np.float64],
        *,
        rows: int | None = None,
        stop: StopRule | None = None,
        dwell: DwellRule | None = None,
    ) -> None:
        where = checked(candidates)
        y, x = where.T
        height, width = float(np.ptp(y)), float(np.ptp(x))
        count = _grid_rows(len(where), height, width) if rows is None else rows
        if count < 1:
            raise ValueError(f"found rows={rows}, expected 1 or more")
        line = np.round((y - y.min()) / (height or 1.0) * (count - 1))
        # Lines without candidates do not count: the direction turns from each row to the next.
        row = np.unique(line, return_inverse=True)[1]
        along = np.where(row % 2 == 0, x, -x)
        super().__init__(where, np.lexsort((along, row)), "raster", stop=stop, dwell=dwell)


def _grid_rows(n: int, height: float, width: float) -> int:
    """Rows r of a grid of n points with equal steps: r columns = n, (r - 1) / (columns - 1) = height / width."""
    if not height or not width:
        return n if height else 1
    ratio = width / height
    return max(1, round((ratio - 1 + ((1 - ratio) ** 2 + 4 * ratio * n) ** 0.5) / (2 * ratio)))
