"""A scan as a whole: all its frames, predicted and stitched anew by one version, in float32, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from steering.models import Network
from steering.ptychography import Canvas, Refined, Stitcher, far_field_residual, judge, neighbour_offset, patch_weight
from steering.records import ModelVersion

_FRAMES_AT_ONCE = 32
"""Predicted together."""
_KEPT_BYTES = 2**28
"""Patches of a scan are kept up to so many bytes from the first time to the second; the others are predicted again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanFrames:
    """Frames of a scan in the order of arrival."""

    scan: str
    counts: NDArray
    """(n, y, x)"""
    position: NDArray[np.float64]
    """(n, 2), object pixels."""
    canvas: Canvas
    mask: NDArray[np.bool_]
    """(y, x), True = do not use."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkImage:
    """What one version makes of a whole scan."""

    version: int
    object: NDArray[np.complex64]
    """(Y, X), 0 where it has seen nothing."""
    weight: NDArray[np.float32]
    """(Y, X), the summed weight of the patches over each pixel."""
    residual: NDArray[np.float32]
    """(n,) far-field residual of each frame's patch."""
    offset: NDArray[np.float32]
    """(n,) phase offset of each patch to what overlaps it, radians; NaN where nothing does."""
    trust: NDArray[np.float64]
    """(n,) see `Verdict`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalImage:
    """What a scan leaves."""

    network: NetworkImage
    refined: Refined
    refinement: str
    """How the refined object came about, in words."""


class WholeScan:
    """Predicts all frames of a scan by one version: first to stitch them, then to compare each with the whole image."""

    def __init__(self, frames: ScanFrames, network: Network, version: ModelVersion) -> None:
        """network: with the weights and the optics of the version."""
        self._frames = frames
        self._network = network.eval()
        self._version = version
        self._probe: NDArray[np.complex64] = network.optics.modes().numpy().copy()
        # Pixels that went bad since the version was published must not count as light.
        network.optics.set(self._probe, frames.mask)
        self._stitcher = Stitcher(frames.canvas, patch_weight(self._probe, int(network.hyperparameters["patch"])))
        n = len(frames.counts)
        self._residual, self._offset = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32)
        self._trust = np.full(n, np.nan)
        self._patches: dict[int, NDArray[np.complex64]] = {}
        """Of the first time, by the first of their frames."""
        self._done = 0
        """Frames, those of both turns counted."""

    @property
    def over(self) -> bool:
        """Nothing more is to be done."""
        return self._done >= 2 * len(self._frames.counts)

    @property
    def probe(self) -> NDArray[np.complex64]:
        """The version's own (mode, y, x)."""
        return self._probe

    def go_on(self, stop: Callable[[], bool] | None = None) -> None:
        """Predict until it is over or `stop`, asked before each batch, says True."""
        n = len(self._frames.counts)
        while not self.over and not (stop is not None and stop()):
            second, first = divmod(self._done, n)
            rows = np.arange(first, min(first + _FRAMES_AT_ONCE, n))
            counts, where = self._frames.counts[rows], self._frames.position[rows]
            patches = self._patches.pop(first, None) if second else None
            if patches is None:
                with torch.inference_mode():
                    outputs = self._network(torch.from_numpy(counts.astype(np.float32)))
                patches = torch.polar(*outputs).numpy()
                if not second and (first + len(rows)) * patches[0].nbytes <= _KEPT_BYTES:
                    self._patches[first] = patches
            if second:
                self._look(rows, patches, counts, where)
            else:
                self._stitcher.add(patches, where)
            self._done += len(rows)

    def result(self) -> NetworkImage:
        """What there is by now."""
        return NetworkImage(
            version=self._version.number,
            object=self._stitcher.image(),
            weight=self._stitcher.weight,
            residual=self._residual,
            offset=self._offset,
            trust=self._trust,
        )

    def _look(self, rows: NDArray[np.int64], patches: NDArray, counts: NDArray, where: NDArray[np.float64]) -> None:
        residual = far_field_residual(patches, counts, self._probe, self._frames.mask)
        offset = neighbour_offset(patches, where, self._stitcher)
        verdict = judge(counts, residual, offset, mask=self._frames.mask, version=self._version)
        self._residual[rows], self._offset[rows], self._trust[rows] = residual, offset, verdict.trust


def joined(parts: Iterator[ScanFrames]) -> ScanFrames | None:
    """Parts of a scan, in order, as one; None where there is none."""
    known = list(parts)
    if not known:
        return None
    return ScanFrames(
        scan=known[0].scan,
        counts=np.concatenate([part.counts for part in known]),
        position=np.concatenate([part.position for part in known]),
        canvas=known[-1].canvas,
        mask=known[-1].mask,
    )
