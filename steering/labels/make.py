"""Labels by refinement: a Dask task that refines the newest frames and sends labelled frames to the ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.inference import LabelFrames
from steering.labels.final import FinalSettings
from steering.labels.refinement import LiveSettings, refine_on, yield_to_frames
from steering.learning import Labels
from steering.ptychography import Refined, RefineSettings, extract_patches, far_field_residual, patch_weight


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """The settings of label making."""

    window: int = 400
    """Newest frames of a scan that are refined together."""
    first: RefineSettings = field(default_factory=lambda: RefineSettings(passes=20, alpha=0.1))
    """Refinement for the first labels of a scan."""
    again: RefineSettings = field(default_factory=lambda: RefineSettings(passes=8, alpha=0.1))
    """Refinement for later labels, which continues from the earlier one."""
    worst: float = 4.0
    """Labels whose residual exceeds this many times the median are left out: training on them would teach errors."""
    live: LiveSettings = field(default_factory=LiveSettings)
    """Refinement of the live image while no labels are made."""
    final: FinalSettings = field(default_factory=FinalSettings)
    """Refinement of a scan that is over."""

    def __post_init__(self) -> None:
        for name, each in (("first", self.first), ("again", self.again), ("live", self.live.refine)):
            if each.positions_from_pass is not None:
                # Patches are cut, and the next refinement begins, at the positions as they were recorded.
                raise ValueError(
                    f"found positions_from_pass={each.positions_from_pass} in {name}, expected it in final.refine "
                    "alone: positions are corrected in the last refinement of a scan"
                )

    def on(self, device: str) -> LabelSettings:
        """The same, computed on this device, see `RefineSettings.device`."""
        return replace(
            self,
            first=replace(self.first, device=device),
            again=replace(self.again, device=device),
            live=replace(self.live, refine=replace(self.live.refine, device=device)),
            final=replace(self.final, refine=replace(self.final.refine, device=device)),
        )


_LEAST_SEEN = 0.9
"""Least refined share of a held-out patch, weighted by illumination, for it to be used as a label."""

_NO_WORSE = 1.1
"""Highest ratio of an external label's residual to that of the network's prediction: noise alone makes some difference
where both are right."""


@dataclass(frozen=True)
class LabelReport:
    """The outcome of making labels."""

    count: int
    residual: float
    seconds: float
    left_out: int = 0
    """Labels that were made and explain their frames too badly to be trained on."""
    reason: str = ""
    """Why count is 0, where frames were there."""


def make_labels(
    predictor: Any,
    ranks: Sequence[Any],
    scan: str,
    *,
    stratum: int,
    patch: int,
    settings: LabelSettings,
    generation: int = 0,
) -> LabelReport:
    """Refine the newest frames of a scan, cut labels out of the object, send each rank its share.

    predictor, ranks: actors; generation: of the ranks. Frames, labels and objects go from worker to worker; only the
    report returns.
    """
    begun = time.perf_counter()
    yield_to_frames()
    frames: LabelFrames | None = predictor.label_frames(scan, settings.window).result()
    if frames is None or not teaching(frames).any():
        reason = "" if frames is None else "all of its newest frames are kept from training"
        return LabelReport(0, float("nan"), time.perf_counter() - begun, reason=reason)
    labels, refined, left_out = label(frames, stratum=stratum, patch=patch, settings=settings)
    held = send(labels, ranks, generation)
    shown = refined
    if frames.withheld.any():
        # Frames kept from training are still shown: the object on display is refined from every frame. Until labels
        # have improved the probe, the live refinement's object is no better start than none.
        before = None if frames.refined_labels is None else frames.refined
        shown = refine_on(frames, np.ones_like(frames.withheld), before, _passes(frames, settings))
    residual = float(np.median(labels.residual)) if len(labels.residual) else float("nan")
    predictor.take_refined(scan, refined, shown, frames.canvas, residual).result()
    count, reason = _trainable(int((~labels.held_out).sum()), held)
    return LabelReport(count, residual, time.perf_counter() - begun, left_out, reason)


def _trainable(labelled: int, held: Sequence[int]) -> tuple[int, str]:
    """How many frames count as labelled, and why none does. Ranks train together or not at all: one without a frame
    would have nothing to train on.

    labelled: frames to train on; held: how many of the scan each rank has, with those of earlier times.
    """
    lacking = [str(rank) for rank, count in enumerate(held) if not count]
    if not labelled:
        return 0, "no label explains its frame well enough to be trained on"
    if lacking:
        return 0, f"rank {', '.join(lacking)} of {len(held)} has none of the {labelled} labelled frames, expected some"
    return labelled, ""


def teaching(frames: LabelFrames) -> NDArray[np.bool_]:
    """(n,) True for the frames that labels are refined from: those that training may use."""
    return ~(frames.held_out | frames.withheld)


def label(frames: LabelFrames, *, stratum: int, patch: int, settings: LabelSettings) -> tuple[Labels, Refined, int]:
    """Labels for the frames of `teaching`, and for held-out frames that neighbouring frames illuminate enough.

    Returns the labels, the refined object they were cut from, and the number left out by `fit_to_teach`.
    """
    refined = refine_on(frames, teaching(frames), frames.refined_labels, _passes(frames, settings))
    # The label of a held-out frame comes from its neighbours alone: where they illuminate too little, there is none.
    weight = patch_weight(refined.probe, patch)
    seen = extract_patches(refined.covered.astype(np.complex64), frames.canvas, frames.position, patch).real
    lit = (seen * weight).sum((-2, -1)) >= _LEAST_SEEN * weight.sum()
    made = ~frames.withheld & (~frames.held_out | lit)
    patches = extract_patches(refined.object, frames.canvas, frames.position[made], patch)
    residual = far_field_residual(patches, frames.counts[made], refined.probe, frames.mask)
    good = fit_to_teach(residual, worst=settings.worst)
    rows = np.flatnonzero(made)[good]
    labels = labels_of(frames, rows, patches[good], residual[good], stratum=stratum, probe=refined.probe)
    return labels, refined, int((~good).sum())


def fit_to_teach(
    residual: NDArray[np.float32], *, worst: float, usual: float | None = None, predicted: NDArray | None = None
) -> NDArray[np.bool_]:
    """(n,) True for labels that explain their frames well enough.

    A label is left out where its own far-field residual is above `worst` times the usual one: that of the newest labels
    of the scan, else the median of these. Where `predicted` (n,) is given, the residual of the network's predictions,
    it is left out too where it explains its frame clearly less well than the network does already.
    """
    if not len(residual):
        return np.zeros(0, bool)
    middle = float(np.median(residual)) if usual is None else usual
    good = residual <= worst * middle
    return good if predicted is None else good & (residual <= _NO_WORSE * predicted)


def labels_of(
    frames: LabelFrames,
    rows: NDArray[np.int64],
    patches: NDArray[np.complex64],
    residual: NDArray[np.float32],
    *,
    stratum: int,
    probe: NDArray[np.complex64] | None,
) -> Labels:
    """The labels (m, patch, patch) of these rows of the frames."""
    return Labels(
        scan=frames.scan,
        stratum=stratum,
        frame_id=frames.frame_id[rows],
        counts=frames.counts[rows],
        amplitude=np.abs(patches),
        phase=np.angle(patches).astype(np.float32),
        residual=residual,
        held_out=frames.held_out[rows],
        probe=probe,
        mask=frames.mask,
    )


def send(labels: Labels, ranks: Sequence[Any], generation: int) -> list[int]:
    """Give each rank, an actor, its share; how many frames of the scan to train on each has now."""
    return [rank.receive(labels.share(k, len(ranks), generation)).result() for k, rank in enumerate(ranks)]


def _passes(frames: LabelFrames, settings: LabelSettings) -> RefineSettings:
    return settings.first if frames.refined_labels is None else settings.again
