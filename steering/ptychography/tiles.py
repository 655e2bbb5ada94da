"""A grid of tiles over a canvas: which of them have changed, so that a reader in another thread copies only those."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE = 64
"""Pixels of a tile's side."""

Part = tuple[slice, slice]


class Tiles:
    """Counts the changes of each tile. One thread writes; any number of others read what `changed` says is new."""

    def __init__(self, shape: tuple[int, int]) -> None:
        """shape: pixels (y, x) of the canvas."""
        self.shape = shape
        self.grid = (-(-shape[0] // TILE), -(-shape[1] // TILE))
        """Tiles along (y, x)."""
        self.edits = np.zeros(self.grid, np.int64)
        """Twice the number of changes of each tile; odd while it is being changed."""

    @property
    def padded(self) -> tuple[int, int]:
        """Pixels (y, x) of the grid: whole tiles."""
        return self.grid[0] * TILE, self.grid[1] * TILE

    @staticmethod
    def under(y: int, x: int, size: int) -> Part:
        """The tiles that a square of `size` pixels with its corner at (y, x) touches, as slices of the grid."""
        return slice(y // TILE, (y + size - 1) // TILE + 1), slice(x // TILE, (x + size - 1) // TILE + 1)


def tiles_of(values: Tensor, which: NDArray[np.int64]) -> Tensor:
    """Copies (k, side, side) of these tiles (k, 2) of (row, column). values: (rows, side, columns, side)."""
    rows, columns = (torch.from_numpy(np.ascontiguousarray(axis)) for axis in which.T)
    return values[rows, :, columns, :]


class TileCopy:
    """A stitched image as another thread sees it, made smaller by a whole factor.

    `update` computes only what has changed since the last call, and never stops the thread that stitches. Not to be
    called by two threads at a time.
    """

    def __init__(self, light: NDArray, weight: NDArray, tiles: Tiles, *, factor: int = 1, least: float = 0.0) -> None:
        """light, weight: the sums (padded Y, X) that are read. factor: pixels of the canvas for one of the copy, a
        power of two up to TILE. least: weight below which a pixel counts as not seen."""
        if factor < 1 or TILE % factor:
            raise ValueError(f"found factor {factor}, expected 1, 2, 4, ... up to {TILE}")
        self._tiles = tiles
        self._least = least
        self._factor = factor
        rows, columns = tiles.grid
        shape = (rows, TILE, columns, TILE)
        self._light, self._weight = torch.from_numpy(light).view(shape), torch.from_numpy(weight).view(shape)
        self._known = np.zeros(tiles.grid, np.int64)
        side = TILE // factor
        self._image = torch.zeros(rows, side, columns, side, dtype=torch.complex64)
        self._seen = torch.zeros(rows, side, columns, side)
        self._crop = tuple(slice(-(-size // factor)) for size in tiles.shape)

    @property
    def image(self) -> NDArray[np.complex64]:
        """(Y, X) / factor: the weighted mean of the pixels, 0 where there is nothing. The copy's own memory."""
        return self._flat(self._image)

    @property
    def weight(self) -> NDArray[np.float32]:
        """(Y, X) / factor: the mean weight of the pixels. The copy's own memory."""
        return self._flat(self._seen)

    def parts(self, which: NDArray[np.int64]) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
        """Image and weight (k, side, side) of these tiles (k, 2), as the copy has them."""
        return tiles_of(self._image, which).numpy(), tiles_of(self._seen, which).numpy()

    def update(self, *, together: int = 64) -> NDArray[np.int64]:
        """Copy the tiles that have changed, so many at a time. Returns which, (k, 2) of (row, column).

        A tile that is changed again and again meanwhile is left as it was until the next call.
        """
        taken = []
        for _ in range(3):  # what was being written when it was read is read again
            changed = np.argwhere(self._tiles.edits != self._known)
            for start in range(0, len(changed), together):
                taken.append(self._take(changed[start : start + together]))
            if not len(changed):
                break
        return np.unique(np.concatenate(taken), axis=0) if taken else np.zeros((0, 2), np.int64)

    def _take(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        rows, columns = which.T
        before = self._tiles.edits[rows, columns]
        light, weight = tiles_of(self._light, which), tiles_of(self._weight, which)
        whole = (before % 2 == 0) & (self._tiles.edits[rows, columns] == before)
        if not whole.all():
            keep = torch.from_numpy(whole)
            light, weight, which, before = light[keep], weight[keep], which[whole], before[whole]
            rows, columns = which.T
        if self._factor > 1:
            light, weight = self._reduced(light), self._reduced(weight)
        area = self._factor**2
        seen = weight > self._least * area
        image = torch.where(seen, light / torch.where(seen, weight, 1.0), 0.0)
        y, x = (torch.from_numpy(np.ascontiguousarray(axis)) for axis in which.T)
        self._image[y, :, x, :] = image.to(torch.complex64)
        self._seen[y, :, x, :] = (weight / area).clamp_min(0).float()
        self._known[rows, columns] = before
        return which

    def _reduced(self, values: Tensor) -> Tensor:
        side = TILE // self._factor
        return values.view(len(values), side, self._factor, side, self._factor).sum((2, 4))

    def _flat(self, values: Tensor) -> NDArray:
        rows, side, columns, _ = values.shape
        return values.view(rows * side, columns * side).numpy()[self._crop]
