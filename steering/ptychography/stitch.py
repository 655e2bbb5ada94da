"""Patches out of an object and back into one: bilinear interpolation at sub-pixel positions, and its adjoint."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steering.records import Canvas

_LEAST_WEIGHT = 1e-6
"""Of a patch's highest weight: below it a pixel counts as not seen, so that what `remove` leaves behind by rounding
(1e-16) never becomes a value."""


def extract_patches(object: NDArray, canvas: Canvas, positions_px: ArrayLike, size: int) -> NDArray[np.complex64]:
    """The patch of `size` pixels around each position, interpolated bilinearly.

    object: complex (Y, X) on the canvas. positions_px: (n, 2) of (y, x), object pixels; a position stands at pixel
    size // 2 of its patch. Returns (n, size, size). Raises ValueError for a patch that leaves the canvas.
    """
    if object.shape != canvas.shape:
        raise ValueError(f"found an object of shape {object.shape}, expected the canvas's {canvas.shape}")
    corner, fraction = canvas.cells(positions_px, size)
    if not len(corner):
        return np.zeros((0, size, size), np.complex64)
    windows = np.lib.stride_tricks.sliding_window_view(object, (size + 1, size + 1))
    cell = windows[corner[:, 0], corner[:, 1]].astype(np.complex64)
    fy, fx = fraction[:, 0, None, None], fraction[:, 1, None, None]
    rows = cell[:, :-1] * (1 - fy) + cell[:, 1:] * fy
    return np.asarray(rows[:, :, :-1] * (1 - fx) + rows[:, :, 1:] * fx, np.complex64)


def spread(values: NDArray, fraction: NDArray[np.float32]) -> NDArray:
    """Adjoint of the interpolation of `extract_patches`: (n, size, size) to the (n, size + 1, size + 1) pixels read.

    fraction: (n, 2) as `Canvas.cells` returns it.
    """
    n, height, width = values.shape
    fy, fx = fraction[:, 0, None, None], fraction[:, 1, None, None]
    rows = np.zeros((n, height, width + 1), values.dtype)
    rows[:, :, :-1] = values * (1 - fx)
    rows[:, :, 1:] += values * fx
    cell = np.zeros((n, height + 1, width + 1), values.dtype)
    cell[:, :-1] = rows * (1 - fy)
    cell[:, 1:] += rows * fy
    return cell


def patch_weight(probe: NDArray[np.complex64], size: int) -> NDArray[np.float32]:
    """Weight of each pixel of a patch: the probe's intensity, summed over modes, 1 at its maximum.

    probe: complex64 (mode, N, N). Returns (size, size) float32, the central pixels.
    """
    window = probe.shape[-1]
    if not 0 < size <= window:
        raise ValueError(f"found a patch of {size} pixels, expected 1 to the window's {window}")
    start = window // 2 - size // 2
    light = (np.abs(probe) ** 2).sum(0)[start : start + size, start : start + size]
    if not light.max() > 0:
        raise ValueError("found a probe without light in the patch, expected a probe centred in its window")
    return (light / light.max()).astype(np.float32)


class Stitcher:
    """The live object: the weighted average of the patches that overlap.

    With B the interpolation of `extract_patches` and w the weight of a patch's pixels, the image is
    sum B^T(w patch) / sum B^T(w). Patches may be removed again, so that a better model replaces the predictions of an
    older one. Sums are kept in double precision: what `remove` leaves of a patch is rounding (1e-16).
    """

    def __init__(self, canvas: Canvas, weight: NDArray[np.float32]) -> None:
        if weight.ndim != 2 or weight.shape[0] != weight.shape[1] or not np.isfinite(weight).all() or weight.min() < 0:
            raise ValueError(f"found a weight of shape {weight.shape}, expected a square of finite numbers, 0 or more")
        self.canvas = canvas
        self.patch_weight = np.asarray(weight, np.float32)
        self._light = np.zeros(canvas.shape, np.complex128)
        self._weight = np.zeros(canvas.shape, np.float64)

    def add(self, patches: NDArray, positions_px: ArrayLike) -> None:
        """Add patches (n, size, size) complex at positions (n, 2) of (y, x), object pixels."""
        self._put(patches, positions_px, 1)

    def remove(self, patches: NDArray, positions_px: ArrayLike) -> None:
        """Take out patches that were added at these positions; give the same values as to `add`."""
        self._put(patches, positions_px, -1)

    def image(self, part: tuple[slice, ...] = ()) -> NDArray[np.complex64]:
        """(Y, X), 0 where there is nothing yet; only a part of it where slices along y and x are given."""
        light, weight = self._light[part], self._weight[part]
        seen = weight > _LEAST_WEIGHT * float(self.patch_weight.max())
        return np.where(seen, light / np.where(seen, weight, 1.0), 0.0).astype(np.complex64)

    @property
    def weight(self) -> NDArray[np.float32]:
        """(Y, X), the summed weight of the patches over each pixel."""
        return self.weight_of(())

    def weight_of(self, part: tuple[slice, ...]) -> NDArray[np.float32]:
        """The weight in a part of the image, given by slices along y and x."""
        return np.maximum(self._weight[part], 0.0).astype(np.float32)

    def share(self, patches: NDArray, positions_px: ArrayLike) -> tuple[NDArray, NDArray, NDArray[np.int64]]:
        """What these patches add: B^T(w patch) complex and B^T(w), both (n, size + 1, size + 1), and corners (n, 2)."""
        size = len(self.patch_weight)
        if patches.ndim != 3 or patches.shape[1:] != (size, size):
            raise ValueError(f"found patches of shape {patches.shape}, expected (n, {size}, {size}) as the weight")
        corner, fraction = self.canvas.cells(positions_px, size)
        if len(corner) != len(patches):
            raise ValueError(f"found {len(patches)} patches and {len(corner)} positions, expected one for each")
        weight = np.broadcast_to(self.patch_weight, patches.shape)
        return spread(np.asarray(patches, np.complex64) * weight, fraction), spread(weight, fraction), corner

    def under(self, corner: NDArray[np.int64]) -> tuple[NDArray[np.complex128], NDArray[np.float64]]:
        """The two sums under the pixels that patches at these corners (n, 2) touch, each (n, size + 1, size + 1)."""
        size = len(self.patch_weight) + 1
        windows = np.lib.stride_tricks.sliding_window_view
        y, x = corner.T
        return windows(self._light, (size, size))[y, x], windows(self._weight, (size, size))[y, x]

    def _put(self, patches: NDArray, positions_px: ArrayLike, sign: int) -> None:
        light, weight, corner = self.share(patches, positions_px)
        if not np.isfinite(light).all():
            raise ValueError("found patches with values that are not finite, expected finite complex numbers")
        size = light.shape[-1]
        # A slice per patch: the work is inside numpy, and unlike fancy indexing it adds where patches overlap.
        for (y, x), a, w in zip(corner.tolist(), light, weight, strict=True):
            here = (slice(y, y + size), slice(x, x + size))
            self._light[here] += sign * a
            self._weight[here] += sign * w
