"""A chunk of frames: one xarray.Dataset, checked when it is made and nowhere else."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from steering.records.geometry import Geometry


def make_chunk(
    counts: NDArray,
    frame_id: ArrayLike,
    positions: ArrayLike,
    geometry: Geometry,
    *,
    scan: str = "scan",
    acquired: float = 0.0,
) -> xr.Dataset:
    """A chunk: frames with their ids, positions and geometry in one Dataset.

    counts: (frame, y, x) photon counts in the detector's own dtype, zero frequency at (y // 2, x // 2).
    frame_id: (frame,) integers, unique within a campaign. positions: (frame, 2) of (y, x) in geometry.length_unit.
    scan: name of the scan the frames belong to; a chunk never spans two. acquired: seconds since the epoch.

    Pixels that read the all-ones value of an unsigned dtype (how photon counters mark gaps, dead and saturated
    pixels) join the mask of this chunk. Raises ValueError for wrong dims, no frames, positions that do not match the
    frames, duplicate ids, and counts that are not finite or negative outside the mask.
    """
    counts = np.asarray(counts)
    ids = np.asarray(frame_id)
    where = np.asarray(positions, np.float64)
    if counts.ndim != 3 or counts.shape[1:] != geometry.shape:
        raise ValueError(f"found frames of shape {counts.shape}, expected (frame, y, x) with (y, x) = {geometry.shape}")
    if counts.dtype.kind not in "uif":
        raise ValueError(f"found frames of dtype {counts.dtype}, expected real counts (integers or floats)")
    if not len(counts):
        raise ValueError("found a chunk without frames, expected 1 or more: yield no chunk where there is no frame")
    if ids.ndim != 1 or ids.dtype.kind not in "ui" or len(ids) != len(counts):
        raise ValueError(f"found {ids.shape} frame ids of {ids.dtype}, expected {len(counts)} integers, one per frame")
    if len(np.unique(ids)) != len(ids):
        values, times = np.unique(ids, return_counts=True)
        raise ValueError(f"found frame ids {values[times > 1][:5].tolist()} more than once, expected each id once")
    if where.shape != (len(counts), 2):
        raise ValueError(f"found positions of shape {where.shape}, expected ({len(counts)}, 2): (y, x) of each frame")
    if not np.isfinite(where).all():
        raise ValueError(f"found positions that are not finite, first at frame id {ids[~np.isfinite(where).all(1)][0]}")
    mask = _mask(counts, geometry)
    _refuse_bad_counts(counts, ids, mask)
    unit = geometry.length_unit
    return xr.Dataset(
        {"counts": (("frame", "y", "x"), counts), "mask": (("y", "x"), mask)},
        coords={
            "frame": ids.astype(np.int64),
            "position_y": ("frame", where[:, 0], {"units": unit}),
            "position_x": ("frame", where[:, 1], {"units": unit}),
        },
        attrs={
            "scan": scan,
            "acquired": acquired,
            "wavelength": geometry.wavelength,
            "distance": geometry.distance,
            "detector_pixel": geometry.detector_pixel,
            "object_pixel": geometry.object_pixel,
            "length_unit": unit,
            "origin": geometry.origin,
        },
    )


def chunk_geometry(chunk: xr.Dataset) -> Geometry:
    """The geometry in a chunk, with the mask of this chunk."""
    mask = chunk["mask"].values
    return Geometry(
        shape=mask.shape,
        wavelength=chunk.attrs["wavelength"],
        distance=chunk.attrs["distance"],
        detector_pixel=chunk.attrs["detector_pixel"],
        mask=mask if mask.any() else None,
        origin=chunk.attrs["origin"],
    )


def positions_px(chunk: xr.Dataset) -> NDArray[np.float64]:
    """(frame, 2) of (y, x) in object pixels."""
    # Past the coordinates that an item of a Dataset is wrapped in: this is asked for every frame.
    where = np.stack([chunk.variables[name].values for name in ("position_y", "position_x")], axis=1)
    return where / float(chunk.attrs["object_pixel"])


def _mask(counts: NDArray, geometry: Geometry) -> NDArray[np.bool_]:
    mask = ~geometry.good()
    if counts.dtype.kind == "u":
        mask |= (counts == np.iinfo(counts.dtype).max).any(axis=0)
    if mask.all():
        raise ValueError("found no pixel that counts: every one is masked or reads the detector's all-ones value")
    return mask


def _refuse_bad_counts(counts: NDArray, ids: NDArray, mask: NDArray[np.bool_]) -> None:
    if counts.dtype.kind == "u":
        return
    bad = ~np.isfinite(counts) | (counts < 0)
    bad &= ~mask
    if bad.any():
        frame, y, x = np.argwhere(bad)[0]
        raise ValueError(
            f"found {counts[frame, y, x]} at pixel ({y}, {x}) of frame {ids[frame]} ({int(bad.sum())} such values in "
            "all), expected finite counts of 0 or more: add bad pixels to the detector mask"
        )
