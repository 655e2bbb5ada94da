"""How good predictions are, where the truth is known. Nothing here is used to predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from steering.inference.live import LiveImage
from steering.models import ModelStore, Network
from steering.ptychography import Stitcher, align, extract_patches, far_field_residual, phase_correlation
from steering.records import Field, hashes

_TOGETHER = 64
"""Frames that a version predicts in one go here."""
_MOST_JUDGED = 500
"""Frames of a scan by which a version is judged."""
_APART = 0x2545F4914F6CDD1D
"""Keeps the hashes that say which frames are held out apart from those that deal the others out among ranks."""


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Which frames are never trained on, and which of them the reported errors come from.

    every: of so many consecutive frame ids one, drawn by a hash of the ids: a share of the frames that is spread over
    the field, also of a raster of any width and where ids are some apart, and the same wherever it is asked for.
    region: an area, in object pixels, whose frames are kept from labels and training altogether, with every frame
    closer to it than `margin` object pixels; errors then come from that area.
    """

    every: int = 10
    region: Field | None = None
    margin: float = 0.0

    def withheld(self, positions: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(n,) True for frames at positions (n, 2) that neither labels nor training may see."""
        if self.region is None:
            return np.zeros(len(positions), bool)
        return self._distance(positions) <= self.margin

    def held_out(self, frame_id: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,) True for frames that may be labelled, to judge by, but never trained on."""
        block, place = np.divmod(np.asarray(frame_id, np.int64), self.every)
        return place == (hashes(block ^ _APART) % np.uint64(self.every)).view(np.int64)

    def judged(self, frame_id: NDArray[np.int64], positions: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(n,) True for the frames that reported errors come from."""
        return self.held_out(frame_id) if self.region is None else self._distance(positions) <= 0.0

    def _distance(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        region = self.region
        if region is None:
            return np.full(len(positions), np.inf)
        y, x = positions.T
        dy = np.maximum(0.0, np.maximum(region.y0 - y, y - region.y1))
        dx = np.maximum(0.0, np.maximum(region.x0 - x, x - region.x1))
        return np.hypot(dy, dx)


@dataclass(frozen=True)
class Score:
    """Agreement with the truth, free of the gauge (shift of at most 5 px, global phase, linear ramp), and with the
    frames, which needs no truth."""

    phase_error: float
    """Of patches: mean over frames of the illumination-weighted RMS, each freed of its constant phase; radians.
    NaN where only an image was judged, or the truth is not known."""
    phase_correlation: float
    """Of the stitched image: illumination-weighted correlation of the phases, -1..1. NaN where the truth is not
    known."""
    residual: float
    """Of patches: median far-field residual of the frames, 0..1. NaN where only an image was judged."""


def score_patches(
    patches: NDArray[np.complex64], positions: NDArray[np.float64], live: LiveImage
) -> tuple[float, float]:
    """(phase error, phase correlation), as in Score, of patches (n, size, size) at positions (n, 2), object pixels; NaN
    where the truth of their scan is not known."""
    if live.truth is None:
        return float("nan"), float("nan")
    stitcher = Stitcher(live.canvas, live.weight)
    stitcher.add(patches, positions)
    image, wanted = stitcher.image(), live.truth
    # Overlap must not count twice: a pixel that many frames see is one pixel.
    seen = np.minimum(stitcher.weight, 1.0) * (wanted != 0)
    # The truth is brought to the patches' gauge, not the other way round: patches cannot be shifted singly.
    same_gauge = align(wanted, image, weight=seen)
    wanted_patches = extract_patches(same_gauge, live.canvas, positions, patches.shape[-1])
    known = (np.abs(wanted_patches) > 0).all((1, 2))
    errors = patch_phase_error(patches[known], wanted_patches[known], live.weight)
    return float(errors.mean()) if known.any() else float("nan"), phase_correlation(image, wanted, weight=seen)


def score_versions(
    models: ModelStore,
    versions: tuple[int, ...],
    live: LiveImage,
    mask: NDArray[np.bool_],
    kind: type[Network] | None = None,
) -> dict[int, Score]:
    """How well versions do on the frames of a scan that errors are reported from, as they were trained: in float32.

    Of more than 500 such frames 500 are taken, evenly over the scan. mask: bad pixels (y, x) known by now. kind: class
    of the network, see ModelStore.load. Empty where no such frame was measured.
    """
    rows = np.flatnonzero(live.frames["judged"])
    rows = rows[live.frames.kept(rows, "counts")]
    if not len(rows):
        return {}
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MOST_JUDGED)).round().astype(int)]
    (where,) = live.frames.read("position", rows=rows)
    scores = {}
    for version in versions:
        network = models.load(version, network=kind)
        # Pixels that went bad since it was published must not count as light.
        network.optics.set(network.optics.modes().numpy(), mask)
        probe = network.optics.modes().numpy()
        patches, residuals = [], []
        for start in range(0, len(rows), _TOGETHER):
            (counts,) = live.frames.read("counts", rows=rows[start : start + _TOGETHER])
            with torch.inference_mode():
                patches.append(torch.polar(*network(torch.from_numpy(counts.astype(np.float32)))).numpy())
            residuals.append(far_field_residual(patches[-1], counts, probe, mask))
        agreement = score_patches(np.concatenate(patches), where, live)
        scores[version] = Score(*agreement, float(np.median(np.concatenate(residuals))))
    return scores


def score_refined(live: LiveImage) -> Score | None:
    """How good the refined object of a scan is; None where the truth is not known or nothing was refined."""
    refined = live.refined
    if live.truth is None or refined is None:
        return None
    weight = (refined.covered & (live.truth != 0)).astype(np.float32)
    return Score(float("nan"), phase_correlation(refined.object, live.truth, weight=weight), float("nan"))


def note_errors(
    live: LiveImage, rows: NDArray[np.int64], patches: NDArray[np.complex64], positions: NDArray[np.float64]
) -> None:
    """Fill in the errors of rows (n,) whose first patches (n, size, size) at positions (n, 2) these are. For one thread
    at a time."""
    live.frames.fill(rows, error=patch_errors(live, patches, positions))


def patch_errors(
    live: LiveImage, patches: NDArray[np.complex64], positions: NDArray[np.float64]
) -> NDArray[np.float32]:
    """(n,) phase error of patches (n, size, size) at positions (n, 2), radians; NaN where the truth is not known."""
    if live.truth is None:
        return np.full(len(patches), np.nan, np.float32)
    wanted = extract_patches(live.truth, live.canvas, positions, patches.shape[-1])
    known = (wanted != 0).all((1, 2))
    return np.where(known, patch_phase_error(patches, wanted, live.weight), np.nan).astype(np.float32)


def patch_phase_error(
    patches: NDArray[np.complex64], wanted: NDArray[np.complex64], weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(n,) probe-weighted RMS phase difference of patches (n, h, w), each freed of its constant phase; radians."""
    product = patches * wanted.conj()
    constant = (product * weight).sum((-2, -1), keepdims=True)
    difference = np.angle(product * np.exp(-1j * np.angle(constant)))
    return np.sqrt((difference**2 * weight).sum((-2, -1)) / weight.sum()).astype(np.float32)
