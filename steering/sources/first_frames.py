"""A live scan without a probe begins one from its first frames, measured on a raster in the middle of the field."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from steering.records import Decision
from steering.sources.finding import sure_orientation, turned
from steering.sources.first_probe import turn_without_probe, with_probe
from steering.sources.frames import clean
from steering.sources.live import LiveSource
from steering.sources.recordings import Recording
from steering.sources.streams import FRAMES, Began, Stream

LEAST = 30
"""Fewer frames say too little of a beam."""
_QUIET_S, _SETTLED_S, _LOOK_S = 10.0, 1.5, 0.2
"""Seconds after the last frame after which no other is waited for; those where all that were asked for are known to
have come or to be lost; and those between two looks."""


def announced(frames: Stream, seconds: float | None) -> Began:
    """What a stream of frames says first when a scan begins. seconds: for which it is listened to; None: for ever.

    Raises TimeoutError where no scan begins meanwhile, and what the stream raises.
    """
    stopped, begun_at = threading.Event(), time.monotonic()
    try:
        for record in frames.records(stopped):
            if isinstance(record, Began):
                return record
            if seconds is not None and time.monotonic() - begun_at > seconds:
                break
    finally:
        stopped.set()
    raise TimeoutError(f"found no scan that begins within {seconds} s, expected one: is the detector armed?")


def raster_block(candidates: NDArray[np.float64], frames: int) -> NDArray[np.float64]:
    """(n, 2) of the candidates, row by row: those nearest to the middle of the field, n = frames where there are."""
    middle = (candidates.min(0) + candidates.max(0)) / 2
    distance = np.abs(candidates - middle).max(axis=1)  # a square
    chosen = candidates[np.argsort(distance, kind="stable")[:frames]]
    return chosen[np.lexsort((chosen[:, 1], chosen[:, 0]))]


def begun(
    source: LiveSource,
    *,
    probe: NDArray[np.complex64] | None = None,
    orientation: str = "none",
    frames: int = 100,
    modes: int = 1,
    focus: str | None = None,
    phase: str | None = None,
    device: str = "auto",
) -> tuple[Recording, str]:
    """The first frames of a live source with a probe, begun from them where none is given, and how they are turned.

    Where the source can be steered they are measured on a raster, else they are those that come first; it is closed
    then: open another one. orientation: of its frames, a name of ORIENTATIONS; "auto": found by them, `focus` and
    `phase` then tell twins apart, see `turn_without_probe`. device: see `find_device`. Raises ValueError for fewer than
    30 frames, and where no turn explains them, RuntimeError for a stream that fails.
    """
    recording = replace(first(source, frames), probe=probe)
    if orientation == "auto":
        if probe is None:
            orientation, note = turn_without_probe(recording, focus=focus, phase=phase, device=device)
        else:
            found = sure_orientation(recording, device=device)
            orientation, note = found.orientation, str(found)
        recording = replace(turned(recording, orientation), notes=(note,))
    return with_probe(recording, modes=modes, device=device), orientation


def first(source: LiveSource, frames: int) -> Recording:
    """The first frames of a live source, see `begun`, as a recording without a probe."""
    if source.plan.motion is not None:
        where = raster_block(source.candidates, frames)
        source.apply(Decision(positions=where, reasons=("to begin a probe",) * len(where)))
        frames = min(frames, len(where))
    chunks, taken, newest = [], 0, [time.monotonic()]
    over = threading.Event()
    threading.Thread(target=_close_when_quiet, args=(source, newest, over), daemon=True).start()
    try:
        for chunk in source.chunks():
            newest[0] = time.monotonic()
            chunks.append(chunk)
            taken += chunk.sizes["frame"]
            if taken >= frames:
                source.close()
    finally:
        over.set()
    if taken < LEAST:
        raise ValueError(
            f"found {taken} frames to begin a probe from, expected {LEAST} or more: give --probe FILE, or a finer "
            "--step"
        )
    counts = np.concatenate([chunk["counts"].values for chunk in chunks])
    axes = ("position_y", "position_x")
    positions = np.stack([np.concatenate([chunk[axis].values for chunk in chunks]) for axis in axes], axis=1)
    counts, bad, _ = clean(counts, None)
    return Recording(
        counts=counts,
        positions=positions,
        probe=None,
        geometry=replace(source.geometry, mask=bad if bad.any() else None),
    )


def _close_when_quiet(source: LiveSource, newest: list[float], over: threading.Event) -> None:
    """Close it once nothing more is to come after the first frame: what is lost would be waited for."""
    while not over.wait(_LOOK_S):
        quiet, frames = time.monotonic() - newest[0], source.streams.get(FRAMES, {})
        # What it says of itself may be half a second old.
        all_known = source.plan.motion is not None and not frames.get("outstanding") and not frames.get("waiting")
        away = frames.get("to_measure_again")  # the beam, which is waited for
        if frames.get("received") and not away and (quiet > _QUIET_S or (all_known and quiet > _SETTLED_S)):
            source.close()
            return
