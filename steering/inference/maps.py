"""Maps of what is known of frames (residual, trust, version), kept up to date frame by frame beside the prediction."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from steering.inference.live import LiveImage
from steering.ptychography.tiles import TILE

_TOGETHER = 256
"""Frames that are put into the maps in one go."""
_EVIDENCE = 1e-4
"""Light of frames that are evidence below which a pixel has no trust: what rounding leaves."""
_STRONG = 0.2
"""Share of the strongest light from which on a frame has a say in a pixel's version."""


class FrameMaps:
    """Trust and residual of the frames that shone on a pixel, weighted by their light; trust of those that are
    evidence, NaN where none is. Version: the newest that had a say in a pixel.

    Not to be used by two threads at a time. Frames that were improved are taken out and put in again.
    """

    def __init__(self, live: LiveImage, factor: int = 1) -> None:
        """factor: pixels of the canvas for one of the maps, a power of two up to TILE."""
        self._live = live
        self._factor = factor
        size = live.weight.shape[0]
        self._cells = (size + factor - 2) // factor + 1
        self._shape = tuple(side * TILE // factor + 1 for side in live.stitcher.tiles.grid)
        self._light, self._residual, self._evidence, self._trust = (torch.zeros(self._shape).view(-1) for _ in range(4))
        self._version = torch.full(self._shape, -1.0).view(-1)
        self._weights, self._says = _variants(live.weight, factor, self._cells)
        self.maps = {
            name: torch.full(self._shape, torch.nan).view(-1) for name in ("trust", "pixel_residual", "model_version")
        }
        """As `update` left them, flat."""
        self._rows = 0
        self._changes = 0
        self._known = {"residual": np.zeros(0), "trust": np.zeros(0), "version": np.zeros(0)}
        self._corners = np.zeros((0, 2), np.int64)

    def update(self) -> NDArray[np.int64]:
        """Take in what has come since the last call. Returns the tiles, (k, 2) of (row, column), that it may change."""
        frames = self._live.frames
        changes, rows = len(frames.changes), len(frames)
        changed = np.unique(np.concatenate([np.zeros(0, np.int64), *frames.changes[self._changes : changes]]))
        changed = changed[changed < self._rows]
        self._make_room(rows)
        for start in range(self._rows, rows, _TOGETHER):
            self._take(np.arange(start, min(rows, start + _TOGETHER)), new=True)
        for start in range(0, len(changed), _TOGETHER):
            self._take(changed[start : start + _TOGETHER], new=False)
        low = self._corners[np.concatenate([np.arange(self._rows, rows), changed])]
        self._rows, self._changes = rows, changes
        high = low + len(self._live.weight) - 1
        ends = [np.stack([y, x], 1) // TILE for y in (low[:, 0], high[:, 0]) for x in (low[:, 1], high[:, 1])]
        # A window wider than a tile has others in its middle.
        middle = [(low + high) // 2 // TILE] if len(self._live.weight) > TILE else []
        return np.unique(np.concatenate([*ends, *middle]), axis=0)

    def parts(self, name: str, tiles: NDArray[np.int64]) -> NDArray[np.float32]:
        """Copies (k, side, side) of these tiles (k, 2) of a map: trust, pixel_residual or model_version."""
        side = TILE // self._factor
        rows, columns = self._live.stitcher.tiles.grid
        whole = self.maps[name].view(self._shape)[: rows * side, : columns * side]
        four = whole.unflatten(0, (rows, side)).unflatten(2, (columns, side))
        y, x = (torch.from_numpy(np.ascontiguousarray(axis)) for axis in tiles.T)
        return four[y, :, x, :].numpy()

    def _make_room(self, rows: int) -> None:
        have = len(self._corners)
        if rows > have:
            more = max(rows, 2 * have) - have
            self._known = {name: np.concatenate([v, np.full(more, np.nan)]) for name, v in self._known.items()}
            self._corners = np.concatenate([self._corners, np.zeros((more, 2), np.int64)])

    def _take(self, rows: NDArray[np.int64], *, new: bool) -> None:
        names = ("residual", "trust", "version")
        where, *values = self._live.frames.read("position", *names, rows=rows)
        now = dict(zip(names, (value.astype(np.float64) for value in values), strict=True))
        before = {name: self._known[name][rows] for name in names}
        if new:
            self._corners[rows] = self._live.canvas.corners(where, self._live.weight.shape[0])[0]
            before = {"residual": np.zeros(len(rows)), "trust": np.full(len(rows), np.nan), "version": now["version"]}
        at, weight, says = self._under(rows)
        if new:
            self._light.index_add_(0, at, weight.reshape(-1))
        finite, was = np.isfinite(now["trust"]), np.isfinite(before["trust"])
        more = {
            "residual": now["residual"] - before["residual"],
            "evidence": finite.astype(float) - was,
            "trust": np.where(finite, now["trust"], 0) - np.where(was, before["trust"], 0),
        }
        sums = (self._residual, self._evidence, self._trust)
        for total, value in zip(sums, more.values(), strict=True):
            total.index_add_(0, at, (weight * torch.from_numpy(value).float()[:, None]).reshape(-1))
        for name in names:
            self._known[name][rows] = now[name]
        lowered = rows[now["version"] < before["version"]]
        if len(lowered):
            self._version_again(lowered)
        self._newest(at, says, now["version"])
        self._draw(at)

    def _draw(self, at: torch.Tensor) -> None:
        """Compute the maps in these pixels."""
        evidence, light, version = self._evidence[at], self._light[at], self._version[at]
        trust = self._trust[at] / evidence.clamp_min(_EVIDENCE)
        self.maps["trust"][at] = torch.where(evidence > _EVIDENCE, trust, torch.nan)
        self.maps["pixel_residual"][at] = self._residual[at] / light.clamp_min(1e-6)
        self.maps["model_version"][at] = torch.where(version < 0, torch.nan, version)

    def _newest(self, at: torch.Tensor, says: torch.Tensor, version: NDArray) -> None:
        number = torch.where(says, torch.from_numpy(version).float()[:, None], -1.0)
        self._version.scatter_reduce_(0, at, number.reshape(-1), "amax")

    def _version_again(self, rows: NDArray[np.int64]) -> None:
        """An older version has the last word on these frames: find out who else has one in their pixels."""
        at, _, _ = self._under(rows)
        self._version[at] = -1.0
        size = self._live.weight.shape[0] + self._factor
        near = np.zeros(len(self._corners), bool)
        for corner in self._corners[rows]:
            near |= (np.abs(self._corners - corner) < size).all(1)
        others = np.flatnonzero(near & np.isfinite(self._known["version"]))
        for start in range(0, len(others), _TOGETHER):
            part = others[start : start + _TOGETHER]
            where, _, says = self._under(part)
            self._newest(where, says, self._known["version"][part])
            self._draw(where)

    def _under(self, rows: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the windows of these rows: indices of the pixels, one after the other, the light (n, pixels), and where it
        is strong."""
        corner = torch.from_numpy(self._corners[rows])
        cell, rest = corner // self._factor, corner % self._factor
        step = torch.arange(self._cells)
        inside = (step[:, None] * self._shape[1] + step).reshape(-1)
        first = cell[:, 0] * self._shape[1] + cell[:, 1]
        which = rest[:, 0] * self._factor + rest[:, 1]
        return (first[:, None] + inside).reshape(-1), self._weights[which], self._says[which]


def _variants(weight: NDArray[np.float32], factor: int, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A patch's weight in the pixels of the map, and where it is strong: (factor^2, cells^2), for each place that the
    patch's corner can have within such a pixel."""
    side = cells * factor
    variants, says = [], []
    for y in range(factor):
        for x in range(factor):
            whole = np.zeros((side, side), np.float32)
            whole[y : y + len(weight), x : x + len(weight)] = weight
            block = whole.reshape(cells, factor, cells, factor)
            variants.append(block.sum((1, 3)))
            says.append((block > _STRONG).any((1, 3)))
    n = factor**2
    return torch.from_numpy(np.stack(variants).reshape(n, -1)), torch.from_numpy(np.stack(says).reshape(n, -1))
