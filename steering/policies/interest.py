"""Structure and residual at candidate positions, from the live image and the frames so far. Arrays in, arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BINS_PER_BEAM = 8
"""The maps are computed in blocks of this fraction of the beam: finer ones cost time and add nothing."""
_LITTLE = 0.1
"""Share of the beam's area that must be measured for the measurement to count as much as the prior."""
_LEAST_SEEN = 0.05
"""Weight of the live image, relative to its maximum, below which a pixel counts as not measured."""


def structure_at(where: NDArray[np.float64], live: Any, beam: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Structure under the beam at each position (n, 2), length unit, and how far it is known.

    live: xarray.Dataset of amplitude, phase and weight over (y, x), coordinates in the length unit. beam: diameter,
    length unit. Structure is the squared gradient of the complex image (no phase wraps there) per pixel, averaged over
    the measured pixels under the beam; known is 0 where none is measured, 1/2 where a tenth is, and close to 1 where
    all are. Returns two (n,).
    """
    y, x = live["y"].values, live["x"].values
    pixel = float(y[1] - y[0])
    weight = live["weight"].values
    seen = weight > _LEAST_SEEN * max(float(weight.max()), 1e-12)
    pixels = _gradient_energy(live["amplitude"].values, live["phase"].values, seen)
    block = max(1, round(beam / pixel / _BINS_PER_BEAM))
    width = beam / 4 / (pixel * block)
    energy, known = (_smoothed(_blocks(values, block), width) for values in pixels)
    row, column = (
        np.clip(((where[:, axis] - start) / (pixel * block)).astype(np.int64), 0, known.shape[axis] - 1)
        for axis, start in enumerate((y[0], x[0]))
    )
    there = known[row, column] / block**2
    return energy[row, column] / np.maximum(there, 1e-6) / block**2, there / (there + _LITTLE)


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


def _smoothed(values: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Gaussian mean of the map; beyond its border nothing is known, and so 0."""
    rows, columns = (_gaussian(n, width) for n in values.shape)
    return rows @ values @ columns


def _gaussian(n: int, width: float) -> NDArray[np.float64]:
    step = np.arange(n)
    kernel = np.exp(-((step[:, None] - step) ** 2) / (2 * width**2))
    return kernel / (width * np.sqrt(2 * np.pi))
