"""Structure and residual at candidate positions, from the live image and the frames so far."""

from __future__ import annotations

import math
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
        """Structure at each position (n, 2), length unit, and how far it is known. Returns two (n,).

        live: as in `Policy.ingest`. Known is 0 where no pixel is measured under the beam, 1/2 where a tenth is, and
        close to 1 where all are.
        """
        if live is not self._live:
            self._begin(live)
        for part in (changed := self._changed()):
            self._sum(part)
        for part in changed:
            self._smoothen(part)
        row, column = (
            np.clip(((where[:, axis] - start) / self._width).astype(np.int64), 0, size - 1)
            for axis, (start, size) in enumerate(zip(self._start, self._sums.shape[1:], strict=True))
        )
        energy, there = self._means[:, row, column] / self._block**2
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

    def _smoothen(self, part: Part) -> None:
        """Compute the means that these blocks have a say in. Beyond the map's border nothing is known, and so 0."""
        reach = math.ceil(_REACH * self._sigma)
        size = self._sums.shape[1:]
        near = tuple(_wider(each, reach, n) for each, n in zip(part, size, strict=True))
        read = tuple(_wider(each, reach, n) for each, n in zip(near, size, strict=True))
        rows, columns = (_gaussian(to, of, self._sigma) for to, of in zip(near, read, strict=True))
        for means, sums in zip(self._means, self._sums, strict=True):
            means[near] = rows @ sums[read] @ columns.T


def excess(values: NDArray[np.float64], known: NDArray[np.float64]) -> NDArray[np.float64]:
    """The part of values (n,) above their floor, relative to its mean; 0 where they are at the floor.

    The floor is the lower quartile of the values of which at least half is known: what the noise of empty places, or
    of well explained frames, leaves. All 1 where nothing stands out.
    """
    measured = known >= 0.5
    if not measured.any():
        return np.ones(len(values))
    above = np.maximum(values - np.quantile(values[measured], 0.25), 0.0)
    mean = float(np.average(above, weights=known))
    return above / mean if mean > 0 else np.ones(len(values))


def closeness(where: NDArray[np.float64], centres: NDArray[np.float64], beam: float) -> NDArray[np.float64]:
    """(n, m): share of the light at positions (n, 2) that falls where that of centres (m, 2) does; 1 at the centre.

    Two evenly illuminated discs overlap about like the Gaussian of a third of their diameter.
    """
    squared = ((where[:, None] - centres[None]) ** 2).sum(-1)
    return np.exp(-squared / (2 * (beam / 3) ** 2))


class Nearby:
    """Finds which of many candidates are near a place, without a look at all of them."""

    def __init__(self, candidates: NDArray[np.float64], beam: float) -> None:
        """candidates: (n, 2); beam: diameter, same unit."""
        self._candidates = candidates
        self._beam = beam
        self._order = np.argsort(candidates[:, 0], kind="stable")
        self._y = candidates[self._order, 0]

    def __call__(self, centre: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows (k,) of the candidates near `centre` (2,), and their closeness to it; farther away it is below 1e-17."""
        reach = _FAINT * self._beam / 3
        first, last = np.searchsorted(self._y, [centre[0] - reach, centre[0] + reach])
        rows = self._order[first:last]
        rows = rows[np.abs(self._candidates[rows, 1] - centre[1]) <= reach]
        return rows, closeness(self._candidates[rows], centre[None], self._beam)[:, 0]


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
