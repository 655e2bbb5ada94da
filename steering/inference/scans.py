"""The scans of a campaign: the live image of each, and its frames on their way to whoever refines or labels them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.inference.live import LiveImage, Truth
from steering.inference.whole_scan import FinalImage, ScanFrames
from steering.ptychography import Canvas, Refined
from steering.records import Geometry, chunk_geometry


class Scans:
    """A live image for each scan, begun with its first chunk; the one before is then over."""

    def __init__(
        self,
        canvas: Canvas,
        geometry: Geometry,
        truths: Mapping[str, Truth],
        *,
        late_bytes: int,
        over: Iterable[str] = (),
    ) -> None:
        """geometry: where a chunk's own cannot be used. late_bytes: see PredictorSettings. over: scans of which nothing
        is known, and of which no frame is used any more."""
        self.images: dict[str, LiveImage] = {}
        """In the order in which they were measured; looked at by whoever has this."""
        self._canvas = canvas
        self._geometry = geometry
        self._truths = truths
        self._late_bytes = late_bytes
        self._over = frozenset(over)
        self._now: str | None = None

    def of_chunk(self, chunk: xr.Dataset, weight: Callable[[], NDArray[np.float32]]) -> LiveImage:
        """The image that a chunk belongs to; weight: of a patch's pixels, for a new one."""
        scan = str(chunk.attrs["scan"])
        if scan not in self.images:
            geometry = chunk_geometry(chunk)
            usable = geometry if geometry.shape == self._geometry.shape else self._geometry
            live = LiveImage(
                scan, self._canvas, weight(), usable, self._truths.get(str(chunk.attrs.get("visit_of", scan)))
            )
            if scan in self._over:
                live.retire()
                return live
            if self._now is not None:
                self.images[self._now].retire()
                forget_beyond(self.images.values(), self._late_bytes)
            self.images[scan] = live
            self._now = scan
        return self.images[scan]

    def conclude(self, scan: str, final: FinalImage | None) -> None:
        """See LiveImage.conclude. Nothing is done for a scan that is not known."""
        if scan in self.images:
            self.images[scan].conclude(final)
            forget_beyond(self.images.values(), self._late_bytes)

    def between(self, scan: str, first: int, last: int, mask: NDArray[np.bool_]) -> ScanFrames | None:
        """Frames of a scan, from the first up to the last in the order of arrival; None where none are there, or their
        counts are no longer kept."""
        live = self.get(scan)
        if live is None or live.forgotten or first >= min(last, len(live.frames)):
            return None
        # Rows are written once: no copy is needed, which would take the time of frames.
        counts, position = live.frames["counts"][first:last], live.frames["position"][first:last]
        return ScanFrames(scan=live.scan, counts=counts, position=position, canvas=live.canvas, mask=mask.copy())

    def get(self, scan: str | None = None) -> LiveImage | None:
        """The image of a scan, by default of the one being measured; None before its first frame."""
        live = self.images.get(scan or self._now or "")
        return live if live is not None and len(live.frames) else None


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
    """Let go of the counts of concluded scans until the others fit into so many bytes, the oldest scan first.

    Scans come in the order in which they were measured. What is let go cannot be labelled any more.
    """
    over = [live for live in scans if live.concluded and not live.forgotten and len(live.frames)]
    held = sum(live.frames.nbytes("counts") for live in over)
    for live in over:
        if held <= budget:
            return
        held -= live.frames.nbytes("counts")
        live.forget()
