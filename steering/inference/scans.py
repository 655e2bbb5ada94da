"""The scans of a campaign: the live image of each, and its frames on their way to whoever refines or labels them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.inference.frame_memory import FrameMemory
from steering.inference.live import LiveImage, Truth
from steering.inference.saved_scans import SavedScans
from steering.inference.scan_reader import ScanReader
from steering.inference.whole_scan import ScanFrames
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
        over: Iterable[str] = (),
        begun: Callable[[LiveImage], None] = lambda live: None,
        retired: Callable[[LiveImage], None] = lambda live: None,
    ) -> None:
        """geometry: where a chunk's own cannot be used. over: scans of which nothing is known, and of which no frame is
        used any more. begun, retired: called with each scan that begins and that is over."""
        self.images: dict[str, LiveImage] = {}
        """In the order in which they were measured; read by other modules too."""
        self._canvas = canvas
        self._geometry = geometry
        self._truths = truths
        self._begun, self._retired = begun, retired
        self._readers: dict[str, ScanReader] = {}
        self._over = frozenset(over)
        self._now: str | None = None

    def of_chunk(self, chunk: xr.Dataset, weight: Callable[[], NDArray[np.float32]]) -> LiveImage:
        """The image that a chunk belongs to; weight: of a patch's pixels, for a new one."""
        scan = str(chunk.attrs["scan"])
        if scan not in self.images:
            geometry = chunk_geometry(chunk)
            usable = geometry if geometry.shape == self._geometry.shape else self._geometry
            truth = self._truths.get(str(chunk.attrs.get("visit_of", scan)))
            live = LiveImage(scan, self._canvas, weight(), usable, truth)
            live.visit_of = str(chunk.attrs.get("visit_of", scan))
            if scan in self._over:
                live.retire()
                return live
            self.retire(self._now)
            self._readers[scan] = ScanReader(live)
            self._begun(live)
            self.images[scan] = live
            self._now = scan
        return self.images[scan]

    def restore(
        self,
        folder: Path,
        saved: Mapping[str, Any],
        weight: NDArray[np.float32],
        written: SavedScans,
        memory: FrameMemory,
    ) -> LiveImage:
        """A scan as an earlier predictor has left it, see `SavedScans`; its image is not stitched yet.

        written: takes note of the files, so that they are not written again. memory: of what the frames take.
        """
        scan, visited = str(saved["scan"]), str(saved["visit_of"])
        live = LiveImage(scan, self._canvas, weight, self._geometry, self._truths.get(visited))
        live.visit_of = visited
        written.restore(folder, saved, live)
        memory.took(sum(map(live.frames.bulk, range(len(live.frames.blocks)))))
        live.restored = len(live.frames)
        self._readers[scan] = ScanReader(live)
        self.images[scan] = live
        if saved["retired"]:
            self.retire(scan)
        else:
            self._begun(live)
            self._now = scan
        return live

    def retire(self, scan: str | None) -> None:
        """A scan is over; nothing is done where it is not known, or over already. For the thread that predicts."""
        live = self.images.get(scan or "")
        if live is not None and not live.retired:
            live.retire()
            self._retired(live)

    def between(self, scan: str, first: int, last: int, mask: NDArray[np.bool_]) -> ScanFrames | None:
        """Frames of a scan, from the first up to the last in the order of arrival; None where the scan has none there.
        Raises ValueError for frames whose counts are no longer kept: those beside them are not the scan."""
        live = self.get(scan)
        rows = np.arange(first, min(last, 0 if live is None else len(live.frames)))
        if live is None or not len(rows):
            return None
        gone = int((~live.frames.kept(rows, "counts")).sum())
        if gone:
            raise ValueError(
                f"found the counts of {gone} frames of scan {scan!r} no longer kept, as they could not be moved to the "
                "disk, expected those of all its frames: free some space in the run's folder, or raise "
                "PredictorSettings.memory_bytes"
            )
        counts, position = live.frames.read("counts", "position", rows=rows)
        return ScanFrames(scan=live.scan, counts=counts, position=position, canvas=live.canvas, mask=mask)

    def get(self, scan: str | None = None) -> LiveImage | None:
        """The image of a scan, by default of the one being measured; None before its first frame."""
        live = self.images.get(scan or self._now or "")
        return live if live is not None and len(live.frames) else None

    def reader(self, scan: str | None = None) -> ScanReader | None:
        """What reads that image for other threads; None before its first frame."""
        live = self.get(scan)
        return None if live is None else self._readers[live.scan]


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
    """The part of the scan's that the windows of these frames lie in: what follows is of this part."""
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
    reader: ScanReader, rows: NDArray[np.int64], *, version: int, probe: NDArray, mask: NDArray
) -> LabelFrames:
    """Copies of these rows of a scan's table, whose counts are still kept, and what belongs to them."""
    live = reader.live
    names = ("frame_id", "counts", "position", "held_out", "withheld", "residual", "acquired", "first_version")
    columns = dict(zip(names, live.frames.read(*names, rows=rows), strict=True))
    canvas = live.canvas.around_windows(columns["position"], probe.shape[-1])
    part = live.canvas.part(canvas)
    predicted, seen = reader.network_image(part)
    refinements, refined, labelled = live.refinements, live.refined, live.refined_labels
    return LabelFrames(
        scan=live.scan,
        **columns,
        version=version,
        mask=mask.copy(),
        probe=probe,
        canvas=canvas,
        refined_labels=None if labelled is None else labelled.of_part(part),
        refined=None if refined is None else refined.of_part(part),
        refinements=refinements,
        label_residual=live.label_residual,
        predicted=predicted,
        seen=seen,
    )


def newest_rows(live: LiveImage, newest: int) -> NDArray[np.int64]:
    """Rows of so many newest frames whose counts are still kept."""
    n = len(live.frames)
    rows = np.arange(max(0, n - newest), n)
    return rows[live.frames.kept(rows, "counts")]


def kept_rows(live: LiveImage, frame_id: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Rows of those of these frames whose counts are still kept, and how many are known but no longer kept."""
    known = (live.frames.row.get(frame) for frame in set(frame_id.tolist()))
    rows = np.array(sorted(row for row in known if row is not None), np.int64)
    kept = live.frames.kept(rows, "counts")
    return rows[kept], int((~kept).sum())


def never_trained(live: LiveImage, most: int, *, among: int = 4096) -> NDArray[np.int64]:
    """Rows of the newest frames that nobody was trained on, of so many newest frames at most."""
    rows = newest_rows(live, among)
    held_out, withheld = live.frames.read("held_out", "withheld", rows=rows)
    found = rows[held_out | withheld]
    return found[max(0, len(found) - most) :]
