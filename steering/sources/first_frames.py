"""A live scan without a probe begins one from its first frames, measured on a raster in the middle of the field."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from steering.records import Decision
from steering.sources.frames import clean
from steering.sources.live import LiveSource
from steering.sources.recordings import Recording
from steering.sources.start import with_probe

LEAST = 30
"""Fewer frames say too little of a beam."""
_QUIET_S = 10.0
"""Seconds after the last frame after which no other is waited for."""


def raster_block(candidates: NDArray[np.float64], frames: int) -> NDArray[np.float64]:
    """(n, 2) of the candidates, row by row: those nearest to the middle of the field, n = frames where there are."""
    middle = (candidates.min(0) + candidates.max(0)) / 2
    distance = np.abs(candidates - middle).max(axis=1)  # a square
    chosen = candidates[np.argsort(distance, kind="stable")[:frames]]
    return chosen[np.lexsort((chosen[:, 1], chosen[:, 0]))]


def begun(source: LiveSource, *, frames: int = 100, modes: int = 1, device: str = "auto") -> Recording:
    """The first frames of a live source, and a probe begun from them; the source is closed then: open another one.

    Where it can be steered they are measured on a raster, else they are those that come first. device: see
    `find_device`. Raises ValueError for fewer than 30 frames, RuntimeError for a stream that fails.
    """
    if source.plan.motion is not None:
        where = raster_block(source.candidates, frames)
        source.apply(Decision(positions=where, reasons=("to begin a probe",) * len(where)))
        frames = min(frames, len(where))
    chunks, taken, quiet = [], 0, threading.Timer(0.0, source.close)
    for chunk in source.chunks():
        quiet.cancel()
        chunks.append(chunk)
        taken += chunk.sizes["frame"]
        if taken >= frames:
            source.close()
        else:  # what is lost would be waited for
            quiet = threading.Timer(_QUIET_S, source.close)
            quiet.daemon = True
            quiet.start()
    quiet.cancel()
    if taken < LEAST:
        raise ValueError(
            f"found {taken} frames to begin a probe from, expected {LEAST} or more: give --probe FILE, or a finer "
            "--step"
        )
    counts = np.concatenate([chunk["counts"].values for chunk in chunks])
    axes = ("position_y", "position_x")
    positions = np.stack([np.concatenate([chunk[axis].values for chunk in chunks]) for axis in axes], axis=1)
    counts, bad, _ = clean(counts, None, inverted=False)
    recording = Recording(
        counts=counts,
        positions=positions,
        probe=None,
        geometry=replace(source.geometry, mask=bad if bad.any() else None),
    )
    return with_probe(recording, modes=modes, device=device)
