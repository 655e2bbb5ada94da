"""Refinement of a scan's object from its newest frames: what labels are cut from, and the live image as time allows."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.inference import LabelFrames
from steering.ptychography import Refined, RefineSettings, extract_patches, far_field_residual, refine


@dataclass(frozen=True, kw_only=True)
class LiveSettings:
    """The settings of the live image's refinement."""

    window: int = 64
    """Newest frames that are refined together; 0: the live image is refined only when labels are made."""
    refine: RefineSettings = field(default_factory=lambda: RefineSettings(passes=2, alpha=0.1))
    """`probe_from_pass` improves the probe too, from one refinement to the next; the network's stays as published."""
    share: float = 0.15
    """Largest share of one core: after each refinement the next one waits accordingly."""

    def __post_init__(self) -> None:
        if self.window < 0 or not 0 < self.share <= 1:
            raise ValueError(f"found window={self.window}, share={self.share}, expected 0 or more and a part of a core")


def refine_live(predictor: Any, scan: str, settings: LiveSettings) -> float:
    """Take the object that is shown a few passes further with the newest frames. Returns the seconds it took.

    predictor: its actor. Prediction has priority: the predictor returns no frames here while any frame waits to be
    predicted, and this thread runs at a lower priority.
    """
    begun = time.perf_counter()
    yield_to_frames()
    frames: LabelFrames | None = predictor.spare_frames(scan, settings.window).result()
    if frames is not None:
        refined = refine_on(frames, np.ones(len(frames.frame_id), bool), frames.refined, settings.refine)
        predictor.take_live(scan, refined, frames.canvas, frames.refinements).result()
    return time.perf_counter() - begun


def refine_on(frames: LabelFrames, use: NDArray[np.bool_], before: Refined | None, settings: RefineSettings) -> Refined:
    """Refine by the frames in use, starting from the object refined before and, outside it, from the network's image.

    An empty beam replaces that image where the network has no prediction, and everywhere if it explains the frames
    better.
    """
    refined = refine(
        frames.counts[use],
        frames.position[use],
        frames.probe if before is None else before.probe,
        frames.canvas,
        start=_start(frames, use, before),
        mask=frames.mask,
        settings=settings,
    )
    if before is None:
        return refined
    # These frames continued from what older frames covered.
    return dataclasses.replace(refined, covered=refined.covered | before.covered)


def yield_to_frames(niceness: int = 5) -> None:
    """Lower this thread's priority (Linux): refinement must not delay prediction where they share cores."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def _start(frames: LabelFrames, use: NDArray[np.bool_], before: Refined | None) -> NDArray[np.complex64]:
    predicted = np.where(frames.seen, frames.predicted, 1).astype(np.complex64)
    flat = np.ones_like(predicted)
    rows = np.flatnonzero(use)[-32:]
    window = frames.probe.shape[-1]
    agreement = []
    for image in (predicted, flat):
        patches = extract_patches(image, frames.canvas, frames.position[rows], window)
        agreement.append(np.median(far_field_residual(patches, frames.counts[rows], frames.probe, frames.mask)))
    start = predicted if agreement[0] < agreement[1] else flat
    if before is None:
        return start
    both = before.covered & frames.seen
    # Each has an unknown constant phase: that of the new region is matched to the region refined before.
    turn = np.angle(np.vdot(start[both], before.object[both]))
    return np.where(before.covered, before.object, start * np.exp(1j * turn)).astype(np.complex64)
