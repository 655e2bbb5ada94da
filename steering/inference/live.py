"""The live image of one scan, and what is known of each of its frames: what the thread that predicts writes."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.inference.table import Table
from steering.inference.whole_scan import FinalImage
from steering.ptychography import Canvas, Refined, Stitcher, offset_of_shares
from steering.records import Geometry, Prediction

Truth = tuple[NDArray[np.complex64], Canvas]
"""An object (Y, X) that is known beforehand, and where it lies."""

AS_MEASURED = "as time allowed while the scan was measured"
"""How the refined object of a scan comes about that is not finished."""
_STEP = 64
"""Rows that one search for frames to be revised goes through, at most."""


class LiveImage:
    """Patches stitched as they are predicted, the refined object beside them, trust and version of every frame.

    One thread adds and improves; what it does for a frame does not grow with the frames or with the canvas. Others read
    by `ScanReader`.
    """

    def __init__(
        self,
        scan: str,
        canvas: Canvas,
        weight: NDArray[np.float32],
        geometry: Geometry,
        truth: Truth | None = None,
    ) -> None:
        self.scan = scan
        self.canvas = canvas
        self.weight = weight
        self.geometry = geometry
        self.truth = None if truth is None else place(truth, canvas)
        self.frames = Table()
        self.stitcher = Stitcher(canvas, weight)
        self._of_version = Stitcher(canvas, weight, single=True)
        """Patches of the version in service alone: the neighbours against which a phase offset is evidence."""
        self._unrevised = 0
        """Rows below this one were not looked at by the version in service."""
        self.refined_labels: Refined | None = None
        self.label_residual: float | None = None
        self.refined: Refined | None = None
        self.refinements = 0
        self.refinement = AS_MEASURED
        """How the refined object came about, in words."""
        self.visit_of = scan
        """The source's own name of the scan."""
        self.restored = 0
        """Rows that an earlier predictor has made: what comes again of them is not a second frame."""
        self.retired = False
        self.concluded = False
        """What the scan leaves is there: nothing that comes later changes it."""
        names = ("amplitude", "phase", "weight")
        self._view = xr.Dataset(
            {name: (("y", "x"), np.zeros(canvas.shape, np.float32)) for name in names},
            coords=self.axes(),
            attrs={"edits": self.stitcher.tiles.edits},
        )

    def retire(self) -> None:
        """The scan is over: nothing of it is predicted again. Its frames stay for labels that come late."""
        self.retired = True
        self._unrevised = 0

    def conclude(self, final: FinalImage | None) -> None:
        """What a scan that is over leaves takes the place of what there was; None: that stays. For one thread at a
        time."""
        self.concluded = True
        if final is None:
            return
        network = final.network
        self.stitcher.replace(network.object, network.weight)
        rows = np.arange(len(network.residual))
        version = np.full(len(rows), network.version)
        columns = {name: getattr(network, name) for name in ("residual", "offset", "trust")}
        self.frames.set(rows, version=version, **columns)
        self.refined, self.refinement = final.refined, final.refinement
        self.refinements += 1

    def let_go(self) -> None:
        """Free what only a scan that goes on needs. For any thread, once the scan is retired."""
        nothing = np.zeros((0, 0), np.float32)
        self._of_version.sums = (nothing, nothing)
        self._view = xr.Dataset()

    def arrays(self) -> list[NDArray]:
        """The images that patches are added to, as large as the canvas."""
        shown = [self._view.variables[name].values for name in self._view.data_vars]
        return [*self.stitcher.sums, *self._of_version.sums, *shown]

    def show_labelled(self, labels: Refined, shown: Refined, canvas: Canvas, residual: float) -> None:
        """Keep what labels were cut from, their median residual, and the refined object to show, unless the scan is
        concluded. canvas: the part of this image's that both are of."""
        part = self.canvas.part(canvas)
        self.refined_labels = labels.put_into(self.refined_labels, self.canvas.shape, part)
        self.label_residual = residual
        if not self.concluded:
            self.refined = shown.put_into(self.refined, self.canvas.shape, part)
            self.refinements += 1

    def show(self, refined: Refined, canvas: Canvas, refinements: int) -> bool:
        """Show an object that went on from that many refinements, of a part of the canvas; False, and nothing is done,
        after a newer one, or where the scan is concluded."""
        if self.refinements != refinements or self.concluded:
            return False
        self.refined = refined.put_into(self.refined, self.canvas.shape, self.canvas.part(canvas))
        self.refinements += 1
        return True

    @property
    def first_versions(self) -> tuple[int, int]:
        """The version in service when the first frame came, and when the newest one did."""
        n = len(self.frames)
        (first,) = self.frames.read("first_version", rows=np.array([0, n - 1]))
        return int(first[0]), int(first[-1])

    @property
    def unrevised(self) -> int:
        """Frames that the version in service may still have to look at again."""
        return self._unrevised

    def version_changed(self) -> None:
        """Another version is in service: phase offsets count from here on, and all frames are to be looked at again."""
        self._of_version.forget()
        self._unrevised = len(self.frames)

    def served_by(self, version: int) -> None:
        """This version is in service, and may have been before: frames of others are to be looked at again."""
        others = np.flatnonzero(self.frames["version"] != version)
        self._unrevised = int(others[-1]) + 1 if len(others) else 0

    def stitch(self, patches: NDArray[np.complex64], positions: NDArray[np.float64]) -> NDArray[np.float32]:
        """Put patches (n, size, size) into the image. Returns their phase offsets (n,) to those of the version in
        service that overlap them; NaN where there are none."""
        shares = self.stitcher.share(patches, positions)
        self.stitcher.put(*shares)
        self._of_version.put(*shares)
        self._look_again(shares[2], patches.shape[-1])
        return offset_of_shares(*shares, self._of_version)

    def stitch_again(self, patches: NDArray[np.complex64], positions: NDArray[np.float64], served: NDArray) -> None:
        """Put patches into the image that an earlier predictor had there; served (n,): by the version in service."""
        self.stitcher.add(patches, positions)
        if served.any():
            self._of_version.add(patches[served], positions[served])
        self._look_again(np.zeros((1, 2), np.int64), max(self.canvas.shape))

    def _look_again(self, corner: NDArray[np.int64], size: int) -> None:
        """Bring the view up to date where patches of `size` pixels at these corners (n, 2) have changed it."""
        shown = {name: field.values for name, field in self._view.variables.items() if name in self._view.data_vars}
        parts: list[tuple[slice, ...]] = [(slice(y, y + size + 1), slice(x, x + size + 1)) for y, x in corner.tolist()]
        if len(parts) * (size + 1) ** 2 > shown["weight"].size:
            parts = [(slice(None), slice(None))]
        for part in parts:
            image = self.stitcher.image(part)
            shown["amplitude"][part], shown["phase"][part] = np.abs(image), np.angle(image)
            shown["weight"][part] = self.stitcher.weight_of(part)

    def add(self, prediction: Prediction, **columns: NDArray) -> int:
        """Keep the first prediction of frames, whose patches are stitched already; columns: what else to keep.

        Returns the bytes that were newly asked for, see Table.append.
        """
        said: dict[str, NDArray] = {"position": prediction.position, "offset": prediction.offset}
        said |= dict.fromkeys(("residual", "live_residual"), prediction.residual)
        said |= dict.fromkeys(("version", "first_version"), prediction.model_version)
        return self.frames.append(prediction.frame_id, **(said | columns))

    def stitch_anew(self, rows: NDArray[np.int64], patches: NDArray[np.complex64]) -> NDArray[np.float32]:
        """Put better patches (n, size, size) of frames into the image, in the place of their old ones; see `stitch`.
        Raises KeyError, and changes nothing, where the old ones are gone."""
        where, old = self.frames.read("position", "patch", rows=rows)
        self.stitcher.remove(old, where)
        return self.stitch(patches, where)

    def behind(self, expected: float, most: int) -> NDArray[np.int64]:
        """Up to `most` rows, newest first, that the version in service has not looked at, and whose residual is above
        what is expected of it. Each is named once; of some hundred rows in between none may be.

        Frames whose patches have left memory are not looked at again.
        """
        high = self._unrevised
        low = max(0, high - _STEP)
        if not high:
            return np.zeros(0, np.int64)
        rows = np.arange(low, high)
        (residual,) = self.frames.read("residual", rows=slice(low, high))
        kept = self.frames.kept(rows, "patch")
        due = rows[kept & (residual > expected)][::-1][:most]
        self._unrevised = 0 if not kept.any() else int(due[-1]) if len(due) == most else low
        return due

    def view(self) -> xr.Dataset:
        """The network's image as a policy sees it: amplitude, phase (radians) and weight over (y, x), with units.

        It shows the image as it is whenever it is read: who wants to keep it takes a copy.
        """
        return self._view

    def axes(self, factor: int = 1) -> dict[str, tuple[str, NDArray, dict[str, str]]]:
        """Positions of the canvas's rows and columns, in the length unit; of every `factor` of them together."""
        grid = zip(("y", "x"), self.canvas.shape, self.canvas.origin, strict=True)
        pixel, unit = self.geometry.object_pixel, {"units": self.geometry.length_unit}
        middle = (factor - 1) / 2
        return {
            axis: (axis, (np.arange(-(-size // factor)) * factor + middle + start) * pixel, unit)
            for axis, size, start in grid
        }


def place(truth: Truth, canvas: Canvas) -> NDArray[np.complex64]:
    """The truth on another canvas, to the nearest whole pixel; 0 where it says nothing.

    The fraction of a pixel that is left is a shift, and so part of the gauge.
    """
    image, own = truth
    shift = np.round(np.subtract(canvas.origin, own.origin)).astype(int)
    lo = np.maximum(0, -shift)
    hi = np.maximum(lo, np.minimum(canvas.shape, np.subtract(own.shape, shift)))
    placed = np.zeros(canvas.shape, np.complex64)
    placed[lo[0] : hi[0], lo[1] : hi[1]] = image[
        lo[0] + shift[0] : hi[0] + shift[0], lo[1] + shift[1] : hi[1] + shift[1]
    ]
    return placed
