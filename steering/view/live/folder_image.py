"""The image of a scan that is over, from the run's folder, as the page gets that of one being measured."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.inference import ImageChange, cut, packed
from steering.inference.small_image import MOST_ROWS, MOST_SIDE, SHOWN

_SIDE = 64
_COLUMNS = {"y": "position_y", "x": "position_x", "residual": "residual", "error": "error", "time": "acquired"}


def image_of(image: xr.Dataset, scan: str) -> ImageChange:
    """All of the image of a scan, made smaller until it fits. image: as object.zarr holds it."""
    factor = -(-max(image["amplitude"].shape) // MOST_SIDE)
    tiles: dict[str, tuple[NDArray, NDArray[np.float32]]] = {}
    grid, shape = (1, 1), (1, 1)
    for name in SHOWN:
        if name in image:
            small = image[name].values[factor // 2 :: factor, factor // 2 :: factor].astype(np.float32)
            four = cut(small, _SIDE)
            grid, shape = four.shape[:2], small.shape
            y, x = np.nonzero(np.isfinite(four).any((2, 3)))
            tiles[name] = (y * grid[1] + x, four[y, x])
    rows = image.sizes.get("frame", 0)
    first = max(0, rows - MOST_ROWS)
    columns = {
        name: image[key].values[first:].astype(np.float64) if key in image else np.full(rows - first, np.nan)
        for name, key in _COLUMNS.items()
    }
    order = np.argsort(columns["time"], kind="stable")
    axes = {axis: image[axis].values.astype(np.float64) for axis in ("y", "x")}
    pixel = float(np.diff(axes["x"][:2])[0]) * factor if len(axes["x"]) > 1 else 1.0
    header = {
        "scan": scan,
        "key": f"folder-{scan}",
        "number": 1,
        "whole": True,
        "cpu_s": 0.0,
        "shape": list(shape),
        "side": _SIDE,
        "grid": list(grid),
        "origin": [float(axes[axis][min(factor // 2, len(axes[axis]) - 1)]) for axis in ("y", "x")],
        "pixel": pixel,
        "unit": str(image.attrs.get("length_unit") or image["x"].attrs.get("units") or "object pixel"),
    }
    return packed(header, tiles, {name: column[order] for name, column in columns.items()}, first)
