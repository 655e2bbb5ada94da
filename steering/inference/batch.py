"""The frames that are predicted together: what has arrived within a stated time, and is fit to be used."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.inference.sift import mask_of, sift
from steering.ptychography import Canvas
from steering.records import positions_px


class Inbox:
    """Chunks that wait for prediction; any number of threads put them in, one takes them out."""

    def __init__(self, *, frames: int, gather_s: float) -> None:
        """frames: most that are taken together. gather_s: seconds that the first of them waits for others."""
        self._frames = frames
        self._gather_s = gather_s
        self._waiting: deque[tuple[xr.Dataset, float]] = deque()
        self._arrival = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, chunk: xr.Dataset, arrived: float) -> None:
        """Add a chunk that arrived then (time.perf_counter)."""
        with self._arrival:
            self._waiting.append((chunk, arrived))
            self._arrival.notify()

    def take(self) -> list[tuple[xr.Dataset, float]]:
        """The oldest chunks, of one scan and together at most `frames` frames (or one chunk that is larger), with the
        time each arrived. Empty where another call has taken them already."""
        with self._arrival:
            if not self._waiting:
                return []
            left = self._waiting[0][1] + self._gather_s - time.perf_counter()
            if left > 0:
                self._arrival.wait_for(self._full, left)
            taken = [self._waiting.popleft()]
            room = self._frames - taken[0][0].sizes["frame"]
            while self._waiting:
                chunk = self._waiting[0][0]
                room -= chunk.sizes["frame"]
                if room < 0 or chunk.attrs["scan"] != taken[0][0].attrs["scan"]:
                    break
                taken.append(self._waiting.popleft())
        return taken

    def _full(self) -> bool:
        return sum(chunk.sizes["frame"] for chunk, _ in self._waiting) >= self._frames


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Frames of one scan."""

    frame_id: NDArray[np.int64]
    counts: NDArray
    """(n, y, x)"""
    position: NDArray[np.float64]
    """(n, 2), object pixels."""
    acquired: NDArray[np.float64]
    """(n,) seconds since the epoch."""
    arrived: NDArray[np.float64]
    """(n,) by time.perf_counter."""


def make_batch(
    taken: list[tuple[xr.Dataset, float]], *, known: Mapping[int, int], mask: NDArray[np.bool_], canvas: Canvas
) -> tuple[Batch | None, NDArray[np.bool_], dict[str, tuple[int, ...]]]:
    """Sift chunks and put what is left together.

    known: ids that the scan has already. mask: bad pixels (y, x) so far. Returns the batch (None where nothing is
    left), the mask with what its frames bring into it, and the ids of the frames set aside by reason.
    """
    parts, aside = [], dict[str, tuple[int, ...]]()
    new: dict[int, int] = {}
    for chunk, arrived in taken:
        keep, refused = sift(chunk, known={**known, **new} if new else known, mask=mask, canvas=canvas)
        for reason, ids in refused.items():
            aside[reason] = aside.get(reason, ()) + ids
        if keep.any():
            mask = mask | mask_of(chunk, keep)
            parts.append((chunk, keep, arrived))
            new |= dict.fromkeys(chunk.variables["frame"].values[keep].tolist(), 0)
    if not parts:
        return None, mask, aside
    batch = Batch(
        frame_id=np.concatenate([chunk.variables["frame"].values[keep] for chunk, keep, _ in parts]),
        counts=np.concatenate([chunk.variables["counts"].values[keep] for chunk, keep, _ in parts]),
        position=np.concatenate([positions_px(chunk)[keep] for chunk, keep, _ in parts]),
        acquired=np.concatenate([np.full(keep.sum(), _acquired(chunk)) for chunk, keep, _ in parts]),
        arrived=np.concatenate([np.full(keep.sum(), arrived) for _, keep, arrived in parts]),
    )
    return batch, mask, aside


def _acquired(chunk: xr.Dataset) -> float:
    """When a chunk was measured, or came where the source does not say; seconds since the epoch."""
    return float(chunk.attrs["acquired"]) or time.time()
