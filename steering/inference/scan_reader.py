"""What others see of a scan while it is predicted: copies that cost the thread which predicts nothing."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.inference.live import LiveImage
from steering.inference.maps import FrameMaps
from steering.inference.serving import Idle, wait_for_idle
from steering.inference.small_image import MOST_ROWS, MOST_SIDE, SHOWN, ImageChange, cut, packed
from steering.ptychography import TileCopy
from steering.ptychography.tiles import TILE

MOST_PIXELS = 1024
"""Of a side of what `picture` returns."""
MOST_FRAMES = 4096
"""Newest frames of whose table `picture` returns the rows."""
_OF_IMAGE: dict[str, Callable[[NDArray], NDArray]] = {"amplitude": np.abs, "phase": np.angle}
_DRAWN = (*_OF_IMAGE, "trust", "pixel_residual", "model_version")
_TOGETHER = 64
"""Tiles that are drawn in one go."""
_PATIENCE_S = 0.2
"""How long a change waits for a time without frames that is as long as the last one took."""
_SEEN = 0.05
"""Weight of the stitched patches from which on the network has said something of a pixel."""


class ScanReader:
    """Reads one scan for any thread; what it has computed once is kept, and only what changed is computed again."""

    def __init__(self, live: LiveImage) -> None:
        self.live = live
        self._picture: Picture | None = None
        self._small: Picture | None = None
        self._change_cpu_s = self._change_s = 0.0
        self._whole: TileCopy | None = None
        self._drawing, self._copying = threading.Lock(), threading.Lock()

    def picture(self, region: tuple[slice, slice] | None = None) -> xr.Dataset:
        """The live image, made smaller until it has at most MOST_PIXELS a side, and its newest frames.

        region: rows and columns of the canvas, to see only these, at the best resolution that fits.
        """
        shape = self.live.canvas.shape
        sides = (
            shape
            if region is None
            else tuple(r.indices(n)[1] - r.indices(n)[0] for r, n in zip(region, shape, strict=True))
        )
        factor = _factor(max(sides), MOST_PIXELS)
        with self._drawing:
            drawn = self._picture
            if drawn is None or drawn.factor != factor:
                drawn = Picture(self.live, factor)
                if region is None and not self.live.retired:
                    self._picture = drawn
            return _dataset(
                self.live, drawn, rows=slice(max(0, len(self.live.frames) - MOST_FRAMES), None), region=region
            )

    def change(self, known: tuple[str, int, int] | None = None, idle: Idle = lambda: float("inf")) -> ImageChange:
        """What has changed of the image, made smaller until it has at most MOST_SIDE pixels a side, since an earlier
        change, which `known` names (`ImageChange.known`); all of it where that is None, or of another image.

        idle: asked first, so that frames do not meet this work; where they come too fast for that, it is done all the
        same after a while.
        """
        factor = _factor(max(self.live.canvas.shape), MOST_SIDE)
        wait_for_idle(idle, self._change_s, _PATIENCE_S)
        with self._drawing:
            begun, at = time.thread_time(), time.perf_counter()
            if self._small is None:
                drawn = self._picture
                self._small = drawn if drawn is not None and drawn.factor == factor else Picture(self.live, factor)
            change = self._small.change(known)
            self._change_cpu_s += time.thread_time() - begun
            self._change_s = time.perf_counter() - at
            change.header["cpu_s"] = self._change_cpu_s
            return change

    def dataset(self) -> xr.Dataset:
        """The whole image with units, the truth beside it where it is known, and the table of all frames: what
        object.zarr holds of a scan. Once it is concluded also the probe of the refined object and, where they were
        corrected, its positions."""
        return _dataset(self.live, Picture(self.live, 1)).assign(_refined_with(self.live))

    def network_image(self, part: tuple[slice, slice]) -> tuple[NDArray[np.complex64], NDArray[np.bool_]]:
        """These rows and columns (Y, X), complex as the network sees them, and where it has seen enough to say
        anything."""
        with self._copying:
            whole = self._whole or self.live.stitcher.copy()
            self._whole = None if self.live.retired else whole
            whole.update()
            return whole.image[part].copy(), whole.weight[part] > _SEEN

    def let_go(self) -> None:
        """The scan is over: free the copies. They are made anew for whoever asks, and not kept."""
        with self._drawing, self._copying:
            self._picture = self._small = self._whole = None


class Picture:
    """All maps of a scan at one resolution."""

    def __init__(self, live: LiveImage, factor: int) -> None:
        self.factor = factor
        self._live = live
        self._stitched = live.stitcher.copy(factor)
        self._of_frames = FrameMaps(live, factor)
        rows, columns = live.stitcher.tiles.grid
        side = TILE // factor
        self._drawn = {name: np.full((rows, side, columns, side), np.nan, np.float32) for name in _DRAWN}
        self._crop = tuple(slice(-(-size // factor)) for size in live.canvas.shape)
        self._refinements = -1
        self._refined: dict[str, NDArray] = {}
        self._key = secrets.token_hex(4)
        self._number = 0
        """Of the newest change."""
        self._changed, self._changed_refined = np.zeros((rows, columns), np.int64), np.zeros((rows, columns), np.int64)
        """Number of the last change of each tile."""
        truth = live.truth
        self._truth = {} if truth is None else _parts(truth, truth != 0, factor, "truth_{}")

    def fields(self) -> dict[str, NDArray]:
        """Every map as it is now, float32, NaN where nothing is known. They are the picture's own memory."""
        self._update()
        flat = {name: four.reshape(four.shape[0] * four.shape[1], -1)[self._crop] for name, four in self._drawn.items()}
        return flat | self._refined | self._truth

    def change(self, known: tuple[str, int, int] | None) -> ImageChange:
        """See `ScanReader.change`."""
        rows = len(self._live.frames)
        self._update()
        same = known is not None and known[0] == self._key
        since, first = (known[1], known[2]) if same and known is not None else (0, 0)
        first = max(first, rows - MOST_ROWS)
        tiles = {}
        for name in SHOWN & self._drawn.keys():
            four = self._drawn[name]
            y, x = np.nonzero(self._changed > since)
            tiles[name] = (y * four.shape[2] + x, four[y, :, x, :])
        for name, image in self._refined.items():
            y, x = np.nonzero(self._changed_refined > since)
            tiles[name] = (y * self._changed.shape[1] + x, cut(image, TILE // self.factor)[y, x])
        names = ("position", "live_residual", "error", "acquired")
        position, *columns = self._live.frames.read(*names, rows=slice(first, rows))
        pixel = self._live.geometry.object_pixel
        axes = self._live.axes(self.factor)
        header = {
            "scan": self._live.scan,
            "key": self._key,
            "number": self._number,
            "whole": not same,
            "shape": [len(axes[axis][1]) for axis in ("y", "x")],
            "side": TILE // self.factor,
            "grid": list(self._changed.shape),
            "origin": [float(axes[axis][1][0]) for axis in ("y", "x")],
            "pixel": pixel * self.factor,
            "unit": self._live.geometry.length_unit,
        }
        of_frames = {"y": position[:, 0] * pixel, "x": position[:, 1] * pixel}
        return packed(header, tiles, of_frames | dict(zip(("residual", "error", "time"), columns, strict=True)), first)

    def _update(self) -> None:
        """Draw what has changed since the last time."""
        tiles = np.unique(np.concatenate([self._of_frames.update(), self._stitched.update()]), axis=0)
        for start in range(0, len(tiles), _TOGETHER):
            self._draw(tiles[start : start + _TOGETHER])
        self._number += 1
        self._changed[tuple(tiles.T)] = self._number
        refined, refinements = self._live.refined, self._live.refinements
        if refined is not None and refinements != self._refinements:
            new = _parts(refined.object, refined.covered, self.factor, "{}_refined")
            for name, image in new.items():
                old = self._refined.get(name, np.full(image.shape, np.nan, np.float32))
                other = np.where((image == old) | (np.isnan(image) & np.isnan(old)), 0.0, 1.0).astype(np.float32)
                self._changed_refined[np.nansum(cut(other, TILE // self.factor), (2, 3)) > 0] = self._number
            self._refined, self._refinements = new, refinements

    def _draw(self, tiles: NDArray[np.int64]) -> None:
        image, weight = self._stitched.parts(tiles)
        y, x = tiles.T
        hidden = weight <= _SEEN
        for name in _DRAWN:
            value = _OF_IMAGE[name](image) if name in _OF_IMAGE else self._of_frames.parts(name, tiles)
            self._drawn[name][y, :, x, :] = np.where(hidden, np.nan, value)


def _parts(image: NDArray[np.complex64], known: NDArray[np.bool_], factor: int, name: str) -> dict[str, NDArray]:
    """Amplitude and phase of an image, of one pixel in the middle of every `factor` x `factor`; NaN where it is not
    known. The mean of them all would take a second for each new image of 4096 x 4096."""
    y, x = (np.minimum(np.arange(0, size, factor) + factor // 2, size - 1) for size in image.shape)
    image, known = image[np.ix_(y, x)], known[np.ix_(y, x)]
    return {
        name.format("amplitude"): np.where(known, np.abs(image), np.nan).astype(np.float32),
        name.format("phase"): np.where(known, np.angle(image), np.nan).astype(np.float32),
    }


def _factor(side: int, most: int) -> int:
    factor = 1
    while -(-side // factor) > most and factor < TILE:
        factor *= 2
    return factor


def _dataset(
    live: LiveImage, drawn: Picture, *, rows: slice = slice(None), region: tuple[slice, slice] | None = None
) -> xr.Dataset:
    names = {"frame_model_version": "version", "residual": "live_residual", "residual_now": "residual"}
    names |= {"frame_trust": "trust"} | {name: name for name in ("offset", "held_out", "error", "acquired")}
    # Like `error`, the residual of a frame is that of its live prediction: what was known when it counted. The residual
    # of the prediction that stands in the image now is `residual_now`.
    frame_id, position, *columns = live.frames.read("frame_id", "position", *names.values(), rows=rows)
    pixel, unit = live.geometry.object_pixel, {"units": live.geometry.length_unit}
    where = position * pixel
    table = {name: ("frame", column) for name, column in zip(names, columns, strict=True)}
    fields = {name: (("y", "x"), value, _UNITS[name]) for name, value in drawn.fields().items()}
    whole = xr.Dataset(
        {
            **fields,
            "position_y": ("frame", where[:, 0], unit),
            "position_x": ("frame", where[:, 1], unit),
            **table,
        },
        coords=live.axes(drawn.factor) | {"frame": frame_id},
        attrs={"scan": live.scan, "length_unit": live.geometry.length_unit, "refinement": live.refinement}
        | {"origin": list(live.geometry.origin)}
        | live.geometry.optics,
    )
    if region is not None:
        shape = live.canvas.shape
        limits = (r.indices(n)[:2] for r, n in zip(region, shape, strict=True))
        y, x = (slice(low // drawn.factor, -(-high // drawn.factor)) for low, high in limits)
        whole = whole.isel(y=y, x=x)
    return whole.copy(deep=True)


def _refined_with(live: LiveImage) -> dict[str, tuple[tuple[str, ...], NDArray, dict[str, str]]]:
    refined, n = live.refined, len(live.frames)
    if not live.concluded or refined is None:
        return {}
    pixel, unit = live.geometry.object_pixel, {"units": live.geometry.length_unit}
    found: dict[str, tuple[tuple[str, ...], NDArray, dict[str, str]]] = {
        "probe_refined": (("mode", "probe_y", "probe_x"), refined.probe, {"long_name": "probe of the refined object"})
    }
    if len(refined.moved) == n and refined.moved.any():
        (position,) = live.frames.read("position")
        where = (position + refined.moved) * pixel
        found |= {f"position_{axis}_refined": (("frame",), where[:, k], unit) for k, axis in enumerate("yx")}
    return found


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
