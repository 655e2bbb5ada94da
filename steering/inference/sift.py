"""Frames that cannot be used are set aside, each with its reason, before anything is predicted from them."""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.ptychography import Canvas
from steering.records import positions_px

SATURATED_SHARE = 0.01
"""Share of the good pixels that may stand at the frame's highest value, where that is high: a count that so many
pixels share is the end of the counter's range, not a measurement."""
_HIGH = 255
"""No counter ends below it; in a weak frame many pixels share the highest count by chance."""


def sift(
    chunk: xr.Dataset, *, known: Container[int], mask: NDArray[np.bool_], canvas: Canvas
) -> tuple[NDArray[np.bool_], dict[str, tuple[int, ...]]]:
    """Which frames of a chunk can be used, (n,), and the ids of the others by reason.

    known: ids that the scan has already. mask: bad pixels (y, x) before this chunk. canvas: where their windows have to
    lie.
    """
    counts, ids = chunk.variables["counts"].values, chunk.variables["frame"].values
    if counts.shape[1:] != mask.shape:
        said = f"frames of {counts.shape[1]} x {counts.shape[2]} pixels, expected {mask.shape[0]} x {mask.shape[1]}"
        return np.zeros(len(ids), bool), {said: tuple(ids.tolist())}
    good = counts[:, ~mask] if mask.any() else counts.reshape(len(counts), -1)
    if good.dtype.kind == "f":
        unusable = ~(np.isfinite(good) & (good >= 0)).all(1)
    else:
        unusable = (good < 0).any(1) if good.dtype.kind == "i" else np.zeros(len(ids), bool)
    highest = good.max(1)
    at_the_top = (good == highest[:, None]).sum(1)
    first = np.unique(ids, return_index=True)[1]
    repeated = np.array([i in known for i in ids.tolist()]) | ~np.isin(np.arange(len(ids)), first)
    reasons = {
        "an id that the scan has already": repeated,
        "counts that are negative or not finite": unusable,
        "no counts at all": highest == 0,
        "saturated": (highest >= _HIGH) & (at_the_top > SATURATED_SHARE * good.shape[1]),
        "a position outside the field": _outside(positions_px(chunk), canvas, len(mask)),
    }
    keep = np.ones(len(ids), bool)
    aside: dict[str, tuple[int, ...]] = {}
    for reason, found in reasons.items():
        if (found & keep).any():
            aside[reason] = tuple(ids[found & keep].tolist())
            keep &= ~found
    return keep, aside


def mask_of(chunk: xr.Dataset, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The chunk's mask (y, x) without what only frames that are set aside have brought into it."""
    mask, counts = chunk.variables["mask"].values, chunk.variables["counts"].values
    if keep.all() or counts.dtype.kind != "u":
        return mask
    top = counts == np.iinfo(counts.dtype).max
    return mask & ~(top[~keep].any(0) & ~top[keep].any(0))


def _outside(where: NDArray[np.float64], canvas: Canvas, window: int) -> NDArray[np.bool_]:
    """(n,) True where the window around a position (n, 2), object pixels, leaves the canvas."""
    corner = np.floor(where - canvas.origin + 0.5) - window // 2
    return np.any((corner < 0) | (corner + window > canvas.shape), axis=1)


class Register:
    """In what order the frames of a campaign came, and which never did."""

    def __init__(self) -> None:
        self.out_of_order = 0
        """Frames that came after one with a higher id: they are used like all others."""
        self._seen: dict[str, set[int]] = {}

    def note(self, scan: str, used: NDArray[np.int64], aside: Mapping[str, tuple[int, ...]]) -> None:
        """Take note of a batch: the ids that are used, and those set aside by reason."""
        seen = self._seen.setdefault(scan, set())
        before = np.maximum.accumulate(np.concatenate([[max(seen, default=-1)], used]))
        self.out_of_order += int((used < before[:-1]).sum())
        seen.update(used.tolist(), *aside.values())

    @property
    def missing(self) -> int:
        """Ids between the lowest and the highest of each scan that never came."""
        return sum(max(seen) - min(seen) + 1 - len(seen) for seen in self._seen.values() if seen)
