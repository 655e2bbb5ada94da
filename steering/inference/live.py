"""The live image of one scan, and what is known of each of its frames."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.inference.whole_scan import FinalImage
from steering.ptychography import Canvas, Refined, Stitcher, neighbour_offset
from steering.records import Geometry, Prediction

Truth = tuple[NDArray[np.complex64], Canvas]
"""An object (Y, X) that is known beforehand, and where it lies."""


_ROOM_BYTES = 2**28
"""What a column asks for at first: address space, of which only the rows that are written take memory. A column that
moves to a larger place takes all frames with it, for which the newest would have to wait."""
_ROOM_ROWS = 2**17
_LEAST_WEIGHT = 0.05
"""Of a patch's highest weight: where the network has seen less, it says nothing."""


class Table:
    """Columns that grow by appending rows: one row per frame, found again by frame id."""

    def __init__(self) -> None:
        self.row: dict[int, int] = {}
        self._columns: dict[str, NDArray] = {}

    def __len__(self) -> int:
        return len(self.row)

    def append(self, frame_id: NDArray[np.int64], **columns: NDArray) -> None:
        """Add frames; every call names the same columns."""
        start, n = len(self.row), len(frame_id)
        again = [frame for frame in frame_id.tolist() if frame in self.row]
        if again:
            raise ValueError(f"found frame ids {again[:5]} a second time in one scan, expected each frame once")
        for name, column in columns.items():
            values = np.asarray(column)
            stored = self._columns.get(name)
            if stored is None or start + n > len(stored):
                row = values.dtype.itemsize * math.prod(values.shape[1:])
                room = min(_ROOM_ROWS, _ROOM_BYTES // max(1, row))
                # Doubling keeps the copying in step with the frames, not with their square.
                grown = np.empty((max(room, 2 * (start + n)), *values.shape[1:]), values.dtype)
                if stored is not None:
                    grown[:start] = stored[:start]
                self._columns[name] = stored = grown
            stored[start : start + n] = values
        for i, frame in enumerate(frame_id.tolist()):
            self.row[frame] = start + i

    def __getitem__(self, name: str) -> NDArray:
        """A view of a column, in the order of arrival; writing to it changes the table."""
        return self._columns[name][: len(self.row)]

    @property
    def frame_id(self) -> NDArray[np.int64]:
        """(n,) in the order of arrival."""
        return np.fromiter(self.row, np.int64, len(self.row))

    def nbytes(self, name: str) -> int:
        """Bytes that a column takes."""
        return self[name].nbytes

    def release(self, name: str, rows: NDArray[np.int64]) -> None:
        """Keep only these rows of a column that is no longer needed whole. It can then no longer be appended to."""
        self._columns[name] = self._columns[name][rows].copy()


class LiveImage:
    """Patches stitched as they are predicted, the refined object beside them, trust and version of every frame."""

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
        self.refined_labels: Refined | None = None
        self.label_residual: float | None = None
        self.refined: Refined | None = None
        self.refinements = 0
        self.retired = False
        self.concluded = False
        """Nothing more is made of its frames: they may be forgotten."""
        self.final: FinalImage | None = None
        self.forgotten = False
        names = ("amplitude", "phase", "weight")
        self._view = xr.Dataset(
            {name: (("y", "x"), np.zeros(canvas.shape, np.float32)) for name in names}, coords=self._axes()
        )

    def retire(self) -> None:
        """The scan is over: nothing of it is predicted again. Its counts stay for labels that come late."""
        if not self.retired and len(self.frames):
            self.frames.release("patch", np.zeros(0, np.int64))
        self.retired = True

    def forget(self) -> None:
        """Of a scan that is over, keep the counts of the frames only that errors are reported from."""
        self.forgotten = True
        self.frames.release("counts", np.flatnonzero(self.frames["judged"]))

    def conclude(self, final: FinalImage | None) -> None:
        """Nothing more comes of this scan. final: what it leaves; None: what there is by now."""
        self.retire()
        self.concluded = True
        if final is None:
            return
        self.final, self.refined = final, final.refined
        n = len(final.network.residual)
        for name in ("residual", "offset", "trust"):
            self.frames[name][:n] = getattr(final.network, name)
        self.frames["version"][:n] = final.network.version

    def show_labelled(self, labels: Refined, shown: Refined, residual: float) -> None:
        """Keep what labels were cut from, their median residual, and the refined object to show, unless the scan is
        concluded."""
        self.refined_labels, self.label_residual = labels, residual
        if not self.concluded:
            self.refined = shown
            self.refinements += 1

    def show(self, refined: Refined, refinements: int) -> bool:
        """Show an object that went on from that many refinements; False, and nothing is done, after a newer one, or
        where the scan is concluded."""
        if self.refinements != refinements or self.concluded:
            return False
        self.refined = refined
        self.refinements += 1
        return True

    @property
    def first_versions(self) -> tuple[int, int]:
        """The version in service when the first frame came, and when the newest one did."""
        first = self.frames["first_version"]
        return int(first[0]), int(first[-1])

    def judged_counts(self) -> NDArray:
        """(m, y, x) counts of the frames that errors are reported from."""
        counts = self.frames["counts"]
        return counts if self.forgotten else counts[self.frames["judged"]]

    def stitch(self, patches: NDArray[np.complex64], positions: NDArray[np.float64]) -> NDArray[np.float32]:
        """Put patches (n, size, size) into the image; returns their phase offsets (n,) to what overlaps them."""
        self.stitcher.add(patches, positions)
        self._look_again(positions, patches.shape[-1])
        return neighbour_offset(patches, positions, self.stitcher)

    def _look_again(self, positions: NDArray[np.float64], size: int) -> None:
        """Bring the view up to date where patches of `size` pixels at these positions (n, 2) have changed it."""
        corner, _ = self.canvas.cells(positions, size)
        shown = {name: field.values for name, field in self._view.data_vars.items()}
        parts: list[tuple[slice, ...]] = [(slice(y, y + size + 1), slice(x, x + size + 1)) for y, x in corner.tolist()]
        if len(parts) * (size + 1) ** 2 > shown["weight"].size:
            parts = [(slice(None), slice(None))]
        for part in parts:
            image = self.stitcher.image(part)
            shown["amplitude"][part], shown["phase"][part] = np.abs(image), np.angle(image)
            shown["weight"][part] = self.stitcher.weight_of(part)

    def add(self, prediction: Prediction, **columns: NDArray) -> None:
        """Keep the first prediction of frames, whose patches are stitched already; columns: what else to keep."""
        said: dict[str, NDArray] = {"position": prediction.position, "offset": prediction.offset}
        said |= dict.fromkeys(("residual", "live_residual"), prediction.residual)
        said |= dict.fromkeys(("version", "first_version", "looked"), prediction.model_version)
        self.frames.append(prediction.frame_id, **(said | columns))

    def improve(
        self,
        rows: NDArray[np.int64],
        patches: NDArray[np.complex64],
        *,
        residual: NDArray,
        trust: NDArray,
        version: int,
    ) -> None:
        """Put better predictions of frames in the place of their old ones."""
        where = self.frames["position"][rows]
        self.stitcher.remove(self.frames["patch"][rows], where)
        self.frames["offset"][rows] = self.stitch(patches, where)
        self.frames["patch"][rows] = patches
        self.frames["residual"][rows] = residual
        self.frames["trust"][rows] = trust
        self.frames["version"][rows] = version

    def behind(self, version: int, expected: float, most: int) -> NDArray[np.int64]:
        """Rows of up to `most` frames, newest first, that this version was not the last to look at, and whose residual
        is above what is expected of it."""
        due = (self.frames["looked"] != version) & (self.frames["residual"] > expected)
        return np.flatnonzero(due)[::-1][:most]

    def network_image(self) -> tuple[NDArray[np.complex64], NDArray[np.bool_]]:
        """(Y, X) complex as the network sees it, and where it has seen enough to say anything."""
        if self.final is not None:
            return self.final.network.object, self.final.network.weight > _LEAST_WEIGHT
        return self.stitcher.image(), self.stitcher.weight > _LEAST_WEIGHT

    def view(self) -> xr.Dataset:
        """The network's image as a policy sees it: amplitude, phase (radians) and weight over (y, x), with units.

        It shows the image as it is whenever it is read: who wants to keep it takes a copy.
        """
        return self._view

    def dataset(self) -> xr.Dataset:
        """The live image with units, the truth beside it where it is known, and the table of frames: what object.zarr
        holds of a scan."""
        image, seen = self.network_image()
        maps = self._maps()
        pixel, unit = self.geometry.object_pixel, {"units": self.geometry.length_unit}
        hidden = ~seen
        fields = {
            "amplitude": np.where(hidden, np.nan, np.abs(image)).astype(np.float32),
            "phase": np.where(hidden, np.nan, np.angle(image)).astype(np.float32),
        }
        fields |= {name: np.where(hidden, np.nan, value).astype(np.float32) for name, value in maps.items()}
        if self.refined is not None:
            outside = ~self.refined.covered
            fields["amplitude_refined"] = np.where(outside, np.nan, np.abs(self.refined.object)).astype(np.float32)
            fields["phase_refined"] = np.where(outside, np.nan, np.angle(self.refined.object)).astype(np.float32)
        if self.truth is not None:
            unknown = self.truth == 0
            fields["truth_amplitude"] = np.where(unknown, np.nan, np.abs(self.truth)).astype(np.float32)
            fields["truth_phase"] = np.where(unknown, np.nan, np.angle(self.truth)).astype(np.float32)
        where = self.frames["position"] * pixel
        rows = {
            "position_y": ("frame", where[:, 0], unit),
            "position_x": ("frame", where[:, 1], unit),
            "frame_model_version": ("frame", self.frames["version"]),
        }
        # Like `error`, the residual of a frame is that of its live prediction: what was known when it counted. The
        # residual of the prediction that stands in the image now is `residual_now`.
        rows |= {
            "residual": ("frame", self.frames["live_residual"]),
            "residual_now": ("frame", self.frames["residual"]),
        }
        rows |= {"frame_trust": ("frame", self.frames["trust"])}
        rows |= {name: ("frame", self.frames[name]) for name in ("offset", "held_out", "error", "acquired")}
        return xr.Dataset(
            {name: (("y", "x"), value, _UNITS[name]) for name, value in fields.items()} | rows,
            coords=self._axes() | {"frame": self.frames.frame_id},
            attrs={"scan": self.scan, "length_unit": self.geometry.length_unit, "refinement": self._refinement()},
        ).copy(deep=True)

    def _refinement(self) -> str:
        """How the refined object came about, in words."""
        return "as time allowed while the scan was measured" if self.final is None else self.final.refinement

    def _axes(self) -> dict[str, tuple[str, NDArray, dict[str, str]]]:
        """Positions of the canvas's rows and columns, in the length unit."""
        grid = zip(("y", "x"), self.canvas.shape, self.canvas.origin, strict=True)
        pixel, unit = self.geometry.object_pixel, {"units": self.geometry.length_unit}
        return {axis: (axis, (np.arange(size) + start) * pixel, unit) for axis, size, start in grid}

    def _maps(self) -> dict[str, NDArray]:
        """Trust and residual of the frames that shone on a pixel, weighted by their light; trust of those that are
        evidence, NaN where none is. Version: the newest that had a say in a pixel."""
        size = self.weight.shape[0]
        light, residual, evidence, trust = np.zeros((4, *self.canvas.shape), np.float32)
        version = np.full(self.canvas.shape, -1, np.float32)
        corners, _ = self.canvas.corners(self.frames["position"], size)
        strong = self.weight > 0.2
        columns = (self.frames[name] for name in ("residual", "trust", "version"))
        for (y, x), misfit, share, number in zip(corners, *columns, strict=True):
            window = (slice(y, y + size), slice(x, x + size))
            light[window] += self.weight
            residual[window] += self.weight * misfit
            if np.isfinite(share):
                evidence[window] += self.weight
                trust[window] += self.weight * share
            version[window] = np.where(strong, np.maximum(version[window], number), version[window])
        return {
            "trust": np.where(evidence > 0, trust / np.maximum(evidence, 1e-6), np.nan),
            "pixel_residual": residual / np.maximum(light, 1e-6),
            "model_version": np.where(version < 0, np.nan, version),
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


_UNITS = {
    "amplitude": {"units": "1", "long_name": "transmission amplitude, network alone"},
    "phase": {"units": "rad", "long_name": "phase, network alone"},
    "amplitude_refined": {"units": "1", "long_name": "transmission amplitude, refined"},
    "phase_refined": {"units": "rad", "long_name": "phase, refined"},
    "truth_amplitude": {"units": "1", "long_name": "transmission amplitude, truth"},
    "truth_phase": {"units": "rad", "long_name": "phase, truth"},
    "trust": {"units": "1", "long_name": "share of the model's validation frames that look as bad, 0 is worst"},
    "pixel_residual": {"units": "1", "long_name": "far-field residual, 0 is best"},
    "model_version": {"units": "1", "long_name": "model version"},
}
