"""The label maker: a Dask task that refines the newest frames and hands labelled frames to the ranks."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.inference import LabelFrames
from steering.learning import Labels
from steering.ptychography import Refined, RefineSettings, extract_patches, far_field_residual, patch_weight, refine


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """The dials of label making."""

    window: int = 400
    """Newest frames of a scan that are refined together."""
    first: RefineSettings = field(default_factory=lambda: RefineSettings(passes=20, alpha=0.1))
    """For the first labels of a scan."""
    again: RefineSettings = field(default_factory=lambda: RefineSettings(passes=8, alpha=0.1))
    """For those that go on from the labels before."""
    worst: float = 4.0
    """Frames whose residual is above so many medians are left out: their labels would teach errors."""


_LEAST_SEEN = 0.9
"""Share of a held-out patch, by illumination, that must be refined for it to be a label."""


@dataclass(frozen=True)
class LabelReport:
    """What came of it."""

    count: int
    residual: float
    seconds: float


def make_labels(
    predictor: Any, ranks: Sequence[Any], scan: str, *, stratum: int, patch: int, settings: LabelSettings
) -> LabelReport:
    """Refine the newest frames of a scan, cut labels out of the object, send each rank its share.

    predictor, ranks: actors. Frames, labels and objects go from worker to worker; only the report returns.
    """
    begun = time.perf_counter()
    if sys.platform == "linux":
        # Labels belong to the slow loop: where cores are shared, this thread alone yields to the fast one.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
    frames: LabelFrames | None = predictor.label_frames(scan, settings.window).result()
    if frames is None:
        return LabelReport(0, float("nan"), 0.0)
    teach = ~(frames.held_out | frames.withheld)
    if not teach.any():
        return LabelReport(0, float("nan"), time.perf_counter() - begun)
    refined = _refine(frames, teach, frames.refined_labels, settings)
    labels, residual = _cut(frames, teach, refined, stratum=stratum, patch=patch, worst=settings.worst)
    shares = [labels.share(number, len(ranks)) for number in range(len(ranks))]
    for rank, share in zip(ranks, shares, strict=True):
        rank.receive(share).result()
    shown = refined
    if frames.withheld.any():
        # What must not be learnt may still be looked at: the object that is shown is refined from every frame.
        shown = _refine(frames, np.ones_like(teach), frames.refined, settings)
    predictor.take_refined(scan, refined, shown).result()
    # Ranks train together or not at all: one without labels would have nothing to train on.
    ready = all((~share.held_out).any() for share in shares)
    return LabelReport(int((~labels.held_out).sum()) if ready else 0, residual, time.perf_counter() - begun)


def _refine(frames: LabelFrames, use: NDArray[np.bool_], before: Refined | None, settings: LabelSettings) -> Refined:
    start = _start(frames, use) if before is None else np.where(before.covered, before.object, 1).astype(np.complex64)
    refined = refine(
        frames.counts[use],
        frames.position[use],
        frames.probe if before is None else before.probe,
        frames.canvas,
        start=start,
        mask=frames.mask,
        settings=settings.first if before is None else settings.again,
    )
    if before is None:
        return refined
    # What older frames have shown is still there: these frames went on from it.
    return dataclasses.replace(refined, covered=refined.covered | before.covered)


def _start(frames: LabelFrames, use: NDArray[np.bool_]) -> NDArray[np.complex64]:
    """Begin from the network's image where it explains the frames better than an empty beam does."""
    predicted = np.where(frames.seen, frames.predicted, 1).astype(np.complex64)
    flat = np.ones_like(predicted)
    rows = np.flatnonzero(use)[-32:]
    window = frames.probe.shape[-1]
    agreement = []
    for image in (predicted, flat):
        patches = extract_patches(image, frames.canvas, frames.position[rows], window)
        agreement.append(np.median(far_field_residual(patches, frames.counts[rows], frames.probe, frames.mask)))
    return predicted if agreement[0] < agreement[1] else flat


def _cut(
    frames: LabelFrames, teach: NDArray[np.bool_], refined: Refined, *, stratum: int, patch: int, worst: float
) -> tuple[Labels, float]:
    """Labels for the frames that taught, and for held-out frames by their neighbours' light; the median residual."""
    residual = np.zeros(len(teach), np.float32)
    residual[teach] = refined.residual
    middle = float(np.median(refined.residual))
    keep = ~frames.withheld & (residual <= worst * middle)
    # A held-out frame is labelled by the light of its neighbours: where too little of it fell, there is no label.
    weight = patch_weight(refined.probe, patch)
    seen = extract_patches(refined.covered.astype(np.complex64), frames.canvas, frames.position, patch).real
    keep &= ~frames.held_out | ((seen * weight).sum((-2, -1)) >= _LEAST_SEEN * weight.sum())
    patches = extract_patches(refined.object, frames.canvas, frames.position[keep], patch)
    labels = Labels(
        scan=frames.scan,
        stratum=stratum,
        frame_id=frames.frame_id[keep],
        counts=frames.counts[keep],
        amplitude=np.abs(patches),
        phase=np.angle(patches).astype(np.float32),
        held_out=frames.held_out[keep],
        probe=refined.probe,
        mask=frames.mask,
    )
    return labels, middle
