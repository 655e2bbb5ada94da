"""Frames of a scan on their way to whoever refines or labels them, and how long their counts are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steering.inference.live import LiveImage
from steering.ptychography import Canvas, Refined


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelFrames:
    """What a label maker needs to know of a scan."""

    scan: str
    frame_id: NDArray[np.int64]
    counts: NDArray
    """(n, y, x)"""
    position: NDArray[np.float64]
    """(n, 2), object pixels."""
    held_out: NDArray[np.bool_]
    withheld: NDArray[np.bool_]
    """(n,) frames of a region that is kept from labels and training altogether."""
    residual: NDArray[np.float32]
    """(n,) of the network's prediction that stands in the image now."""
    acquired: NDArray[np.float64]
    """(n,) seconds since the epoch: when a frame was measured, or came where the source does not say."""
    first_version: NDArray[np.int64]
    """(n,) in service when a frame came."""
    version: int
    """In service now."""
    mask: NDArray[np.bool_]
    probe: NDArray[np.complex64]
    canvas: Canvas
    refined_labels: Refined | None
    """What the last labels were cut from."""
    refined: Refined | None
    """The refined object that is shown: from every frame, also those that labels must not see."""
    refinements: int
    """How often the object that is shown was refined so far."""
    label_residual: float | None
    """Median residual of the newest labels made from these frames; None before the first."""
    predicted: NDArray[np.complex64]
    """(Y, X) the network's own stitched image."""
    seen: NDArray[np.bool_]
    """(Y, X) where the network has said something."""


def frames_of(
    live: LiveImage, rows: slice | NDArray[np.int64], *, version: int, probe: NDArray, mask: NDArray
) -> LabelFrames:
    """Copies of these rows of a scan's table, whose counts are still kept, and what belongs to them."""
    predicted, seen = live.network_image()
    names = ("counts", "position", "held_out", "withheld", "residual", "acquired", "first_version")
    return LabelFrames(
        scan=live.scan,
        frame_id=live.frames.frame_id[rows],
        **{name: live.frames[name][rows].copy() for name in names},
        version=version,
        mask=mask.copy(),
        probe=probe,
        canvas=live.canvas,
        refined_labels=live.refined_labels,
        refined=live.refined,
        refinements=live.refinements,
        label_residual=live.label_residual,
        predicted=predicted,
        seen=seen,
    )


def kept_rows(live: LiveImage, frame_id: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Rows of those of these frames whose counts are still kept, and how many are known but no longer kept."""
    known = sorted(live.frames.row[frame] for frame in set(frame_id.tolist()) & live.frames.row.keys())
    return (np.zeros(0, np.int64), len(known)) if live.forgotten else (np.array(known, np.int64), 0)


def forget_beyond(scans: Iterable[LiveImage], budget: int) -> None:
    """Let go of the counts of scans that are over until the others fit into so many bytes, the oldest scan first.

    Scans come in the order in which they were measured. What is let go cannot be labelled any more.
    """
    over = [live for live in scans if live.retired and not live.forgotten and len(live.frames)]
    held = sum(live.frames.nbytes("counts") for live in over)
    for live in over:
        if held <= budget:
            return
        held -= live.frames.nbytes("counts")
        live.forget()
