"""Structure and residual at candidate positions, from the live image and the frames so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.ptychography.tiles import TILE

_BINS_PER_BEAM = 8
"""The maps are computed in blocks of this fraction of the beam: finer ones cost time and add nothing."""
_LITTLE = 0.1
"""Share of the beam's area that must be measured for the measurement to count as much as the prior."""
_LEAST_SEEN = 0.05
"""Weight of the live image below which a pixel counts as not measured."""
_REACH = 4
"""Standard deviations after which the Gaussian mean ends."""
_FAINT = 9
"""Standard deviations after which a beam's share in a place is lost in rounding beside 1: until then it tells places
apart that are alike otherwise."""
_IN_A_CELL = 32
"""Candidates, at least, on the average of a field that they fill evenly."""
_MANY = 0.25
"""Share of the tiles that have changed from which on everything is computed in one go."""

Part = tuple[slice, slice]
"""Rows and columns."""


class StructureMap:
    """Structure of a live image under the beam: the squared gradient of the complex image (no phase wraps there) per
    pixel, averaged over the measured pixels under the beam.

    It is kept in blocks, and only what has changed in the image is computed again: what a call costs does not grow with
    the canvas.
    """

    def __init__(self, beam: float) -> None:
        """beam: diameter of the illumination, length unit."""
        self._beam = beam
        self._live: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_beam": self._beam, "_live": None}  # all else follows from the image

    def at(self, where: NDArray[np.float64], live: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Structure at each position (n, 2), length unit, and how far it is known, by the image as it is now.

        live: as in `Policy.ingest`. Returns two (n,), see `read`.
        """
        self.update(live)
        return self.read(self.blocks(where))

    def update(self, live: Any) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Take in what has changed in the image. Returns the boxes, low and high (2,) in the length unit, outside of
        which `read` says what it said before."""
        begun = live is not self._live
        if begun:
            self._begin(live)
        changed = self._changed()
        for part in changed:
            self._sum(part)
        boxes = [self._smoothen(part) for part in changed]
        if begun:
            return [(np.full(2, -np.inf), np.full(2, np.inf))]
        return [
            (self._place(rows.start, columns.start), self._place(rows.stop, columns.stop)) for rows, columns in boxes
        ]

    def _place(self, row: int, column: int) -> NDArray[np.float64]:
        """Where a block begins, (2,), length unit."""
        return np.array(self._start) + np.array([row, column]) * self._width

    def blocks(self, where: NDArray[np.float64]) -> NDArray[np.int64]:
        """The block in which each position (n, 2), length unit, lies: (n,), for `read`, as long as the image is."""
        row, column = (
            np.clip(((where[:, axis] - start) / self._width).astype(np.int64), 0, size - 1)
            for axis, (start, size) in enumerate(zip(self._start, self._sums.shape[1:], strict=True))
        )
        return row * self._sums.shape[2] + column

    def read(self, blocks: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Structure in each of these blocks (n,), and how far it is known. Returns two (n,).

        Known is 0 where no pixel is measured under the beam, 1/2 where a tenth is, and close to 1 where all are.
        """
        energy, there = (means.ravel()[blocks] / self._block**2 for means in self._means)
        return energy / np.maximum(there, 1e-6), there / (there + _LITTLE)

    def _begin(self, live: Any) -> None:
        y, x = live["y"].values, live["x"].values
        pixel = float(y[1] - y[0])
        self._live, self._fields = live, [live[name].values for name in ("amplitude", "phase", "weight")]
        self._start = (float(y[0]), float(x[0]))
        self._block = max(1, round(self._beam / pixel / _BINS_PER_BEAM))
        self._width = pixel * self._block
        """Of a block, length unit."""
        self._sigma = self._beam / 4 / self._width
        shape = tuple(-(-size // self._block) for size in (len(y), len(x)))
        self._sums, self._means = np.zeros((2, *shape)), np.zeros((2, *shape))
        """Of the squared gradient and of the measured pixels: in each block, and their Gaussian means."""
        self._edits: NDArray[np.int64] | None = live.attrs.get("edits")
        self._known = np.zeros(0 if self._edits is None else self._edits.shape, np.int64)

    def _changed(self) -> list[Part]:
        """The blocks that may have changed since the last call."""
        rows, columns = self._sums.shape[1:]
        whole = [(slice(0, rows), slice(0, columns))]
        if self._edits is None:
            return whole
        tiles = np.argwhere(self._edits != self._known)
        self._known = self._edits.copy()
        if len(tiles) > _MANY * self._edits.size:
            return whole
        # The gradient of a pixel needs the next one: the last pixels before the tile change too.
        low = np.maximum(tiles * TILE - 1, 0) // self._block
        high = np.minimum(-(-(tiles + 1) * TILE // self._block), (rows, columns))
        return [(slice(a, b), slice(c, d)) for (a, c), (b, d) in zip(low.tolist(), high.tolist(), strict=True)]

    def _sum(self, part: Part) -> None:
        """Sum over the pixels of these blocks."""
        pixels = tuple(slice(each.start * self._block, each.stop * self._block + 1) for each in part)
        amplitude, phase, weight = (field[pixels] for field in self._fields)
        found = _gradient_energy(amplitude, phase, weight > _LEAST_SEEN)
        rows, columns = ((each.stop - each.start) * self._block for each in part)
        for sums, values in zip(self._sums, found, strict=True):
            sums[part] = _blocks(values[:rows, :columns], self._block)

    def _smoothen(self, part: Part) -> Part:
        """Compute the means that these blocks have a say in, and return where these are. Beyond the map's border
        nothing is known, and so 0."""
        reach = math.ceil(_REACH * self._sigma)
        size = self._sums.shape[1:]
        near = _wider(part[0], reach, size[0]), _wider(part[1], reach, size[1])
        read = tuple(_wider(each, reach, n) for each, n in zip(near, size, strict=True))
        rows, columns = (_gaussian(to, of, self._sigma) for to, of in zip(near, read, strict=True))
        for means, sums in zip(self._means, self._sums, strict=True):
            means[near] = rows @ sums[read] @ columns.T
        return near


@dataclass(frozen=True)
class Scale:
    """Floor and mean of values, by which those above the floor stand out."""

    floor: float = 0.0
    mean: float = 0.0
    """Of what is above the floor; 0: nothing stands out."""

    @classmethod
    def of(cls, values: NDArray[np.float64], known: NDArray[np.float64]) -> Scale:
        """The floor is the lower quartile of the values (n,) of which at least half is known: what the noise of empty
        places, or of well explained frames, leaves."""
        measured = known >= 0.5
        if not measured.any():
            return cls()
        floor = float(np.quantile(values[measured], 0.25))
        return cls(floor, float(np.average(np.maximum(values - floor, 0.0), weights=known)))

    def excess(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The part of values (n,) above the floor, relative to its mean; all 1 where nothing stands out."""
        return np.maximum(values - self.floor, 0.0) / self.mean if self.mean > 0 else np.ones(len(values))


def closeness(where: NDArray[np.float64], centres: NDArray[np.float64], beam: float) -> NDArray[np.float64]:
    """(n, m): share of the light at positions (n, 2) that falls where that of centres (m, 2) does; 1 at the centre.

    Two evenly illuminated discs overlap about like the Gaussian of a third of their diameter.
    """
    squared = ((where[:, None] - centres[None]) ** 2).sum(-1)
    return np.exp(-squared / (2 * (beam / 3) ** 2))


class Cells:
    """Candidates by the squares of a grid in which they lie: what is near a place is found without a look at all."""

    def __init__(self, candidates: NDArray[np.float64], beam: float) -> None:
        """candidates: (n, 2); beam: diameter, same unit."""
        self._candidates = candidates
        self._beam = beam
        self._low = candidates.min(0)
        extent = candidates.max(0) - self._low
        self._side = max(2 * beam, math.sqrt(float(extent.prod()) * _IN_A_CELL / len(candidates)))
        cell = ((candidates - self._low) / self._side).astype(np.int64)
        self._shape = tuple((cell.max(0) + 1).tolist())
        number = cell[:, 0] * self._shape[1] + cell[:, 1]
        self._order = np.argsort(number, kind="stable")
        occupied, self._first = np.unique(number[self._order], return_index=True)
        """Of each cell that holds candidates, its number in the grid and where it begins in the order."""
        self._row = np.full(self._shape[0] * self._shape[1] + 1, len(occupied), np.int64)
        self._row[:-1] = np.searchsorted(occupied, np.arange(len(self._row) - 1))
        self.count = np.diff(self._first, append=len(candidates))
        """Candidates in each cell, (c,)."""
        self.of = np.searchsorted(occupied, number)
        """The cell of each candidate, (n,)."""

    def members(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """The candidates in these cells, one cell after the other, and within each from the first to the last."""
        count = self.count[cells]
        step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return self._order[np.repeat(self._first[cells], count) + step]

    def touched(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.int64]:
        """The cells that a box from low (2,) to high (2,) touches."""
        most = np.array(self._shape) - 1
        (y0, x0), (y1, x1) = (
            np.clip(np.floor((edge - self._low) / self._side), 0, most).astype(np.int64).tolist()
            for edge in (low, high)
        )
        rows = np.arange(y0, y1 + 1) * self._shape[1]
        return np.concatenate([np.arange(self._row[row + x0], self._row[row + x1 + 1]) for row in rows])

    def near(self, centre: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows (k,) of the candidates near `centre` (2,), and their closeness to it; farther away it is below 1e-17."""
        reach = _FAINT * self._beam / 3
        rows = self.members(self.touched(centre - reach, centre + reach))
        rows = rows[np.abs(self._candidates[rows] - centre).max(1) <= reach]
        return rows, closeness(self._candidates[rows], centre[None], self._beam)[:, 0]

    def boxes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Corners, low and high (c, 2), of the candidates in each cell."""
        where = self._candidates[self._order]
        return np.minimum.reduceat(where, self._first), np.maximum.reduceat(where, self._first)


def _gradient_energy(
    amplitude: NDArray, phase: NDArray, seen: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(Y, X) squared gradient of the complex image, and 1 where it is known: both neighbours are seen."""
    known = np.zeros(seen.shape, np.float32)
    known[:-1, :-1] = seen[:-1, :-1] & seen[1:, :-1] & seen[:-1, 1:]
    energy = np.zeros(seen.shape, np.float32)
    a, p = amplitude.astype(np.float32), phase.astype(np.float32)
    here = (slice(-1), slice(-1))
    for there in ((slice(1, None), slice(-1)), (slice(-1), slice(1, None))):
        # |b - a|^2 of two complex numbers: no wrap of the phase matters, and nothing cancels.
        energy[here] += (a[there] - a[here]) ** 2 + 4 * a[there] * a[here] * np.sin((p[there] - p[here]) / 2) ** 2
    return energy * known, known


def _blocks(values: NDArray[np.float32], block: int) -> NDArray[np.float64]:
    """Sums over blocks of (block, block) pixels; the last ones may be cut."""
    rows = np.add.reduceat(values, np.arange(0, values.shape[0], block), axis=0, dtype=np.float64)
    return np.add.reduceat(rows, np.arange(0, values.shape[1], block), axis=1)


def _wider(part: slice, reach: int, size: int) -> slice:
    return slice(max(0, part.start - reach), min(size, part.stop + reach))


def _gaussian(to: slice, of: slice, sigma: float) -> NDArray[np.float64]:
    """Weights of the blocks `of` in the means of the blocks `to`."""
    step = np.arange(to.start, to.stop)[:, None] - np.arange(of.start, of.stop)
    kernel = np.exp(-(step**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return np.where(np.abs(step) <= _REACH * sigma, kernel, 0.0)
