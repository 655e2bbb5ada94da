"""The scans of a campaign: the live image of the one that is being measured, and of those that are over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.inference.frames import forget_beyond
from steering.inference.live import LiveImage, Truth
from steering.ptychography import Canvas
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
            live = LiveImage(scan, self._canvas, weight(), usable, self._truths.get(scan))
            if scan in self._over:
                live.retire()
                return live
            if self._now is not None:
                self.images[self._now].retire()
                forget_beyond(self.images.values(), self._late_bytes)
            self.images[scan] = live
            self._now = scan
        return self.images[scan]

    def get(self, scan: str | None = None) -> LiveImage | None:
        """The image of a scan, by default of the one being measured; None before its first frame."""
        live = self.images.get(scan or self._now or "")
        return live if live is not None and len(live.frames) else None
