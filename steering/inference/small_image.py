"""An image made small for people who look at it: tiles of 8 bits with their own scale, only those that have changed.

What is packed here is unpacked by the page in the browser, so that every byte is made once, however many look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHOWN = frozenset(("amplitude", "phase", "amplitude_refined", "phase_refined", "trust", "pixel_residual"))
"""Maps that people look at."""
MOST_SIDE = 512
"""Pixels of a side of what people look at."""
MOST_ROWS = 4096
"""Newest frames that are named."""
NOTHING = 255
"""The value of a pixel of which nothing is known; 0 to 254 are values from the tile's lowest to its highest."""
_ALIGNED = 8


@dataclass(frozen=True, kw_only=True)
class ImageChange:
    """What has changed of a scan's image since another state of it, ready to be sent.

    `header` is of JSON's types: scan; key, of the image that `number` counts the changes of; shape (y, x) in pixels,
    side of a tile, grid (rows, columns) of tiles; origin (y, x) of the first pixel's centre, pixel, unit of both; maps:
    by name the number of tiles and where they begin in `payload`; frames: number of the first one named, how many, and
    where each column begins; whole: whether it is all there is; cpu_s: CPU seconds spent on this scan's changes so far.

    In `payload` a map is the place of each tile in the grid, row by row, as int32, then lowest and highest value of
    each as float32, then its pixels as uint8; a column is float64. Each array begins at a multiple of 8 bytes.
    """

    header: dict[str, Any]
    payload: bytes

    @property
    def known(self) -> tuple[str, int, int]:
        """By which the next change is asked for: key, number of the change, frames known."""
        frames = self.header["frames"]
        return self.header["key"], self.header["number"], frames["first"] + frames["count"]


class Packing:
    """Arrays one after the other in one piece of bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._at = 0

    def add(self, values: NDArray) -> int:
        """Where these begin."""
        data = np.ascontiguousarray(values).tobytes()
        start, self._at = self._at, self._at + -(-len(data) // _ALIGNED) * _ALIGNED
        self._parts += [data, bytes(self._at - start - len(data))]
        return start

    def add_tiles(self, values: NDArray[np.float32], place: NDArray) -> dict[str, Any]:
        """Tiles (k, side, side), NaN where nothing is known, with the place (k,) of each in the grid."""
        scale, small = small_tiles(values)
        return {
            "count": len(values),
            "place": self.add(place.astype(np.int32)),
            "scale": self.add(scale),
            "pixels": self.add(small),
        }

    def whole(self) -> bytes:
        """All of them."""
        return b"".join(self._parts)


def small_tiles(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Lowest and highest value (k, 2) of each tile (k, side, side), and its pixels as shares of 254 of that range;
    NOTHING where a value is not finite."""
    flat = values.reshape(len(values), values[0].size if len(values) else 0)
    known = np.isfinite(flat)
    low = np.where(known, flat, np.inf).min(1, initial=np.inf)
    high = np.where(known, flat, -np.inf).max(1, initial=-np.inf)
    low, high = np.where(np.isfinite(low), low, 0.0), np.where(np.isfinite(high), high, 0.0)
    step = np.where(high > low, high - low, 1.0) / (NOTHING - 1)
    shares = np.rint((np.where(known, flat, 0.0) - low[:, None]) / step[:, None])
    return np.stack([low, high], 1).astype(np.float32), np.where(known, shares, NOTHING).astype(np.uint8)


def cut(image: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """The image (Y, X) as tiles (rows, columns, side, side), NaN beyond its edge."""
    rows, columns = (-(-size // side) for size in image.shape)
    whole = np.full((rows * side, columns * side), np.nan, np.float32)
    whole[: image.shape[0], : image.shape[1]] = image
    return whole.reshape(rows, side, columns, side).swapaxes(1, 2)


def packed(
    header: Mapping[str, Any],
    tiles: Mapping[str, tuple[NDArray, NDArray[np.float32]]],
    columns: Mapping[str, NDArray],
    first: int,
) -> ImageChange:
    """A change of an image: tiles, by map, as place (k,) and values (k, side, side); columns of its frames from number
    `first` on. header: everything else that it says."""
    packing = Packing()
    of_frames = {name: packing.add(column.astype(np.float64)) for name, column in columns.items()}
    maps = {name: packing.add_tiles(values, place) for name, (place, values) in tiles.items() if len(values)}
    count = len(next(iter(columns.values()))) if columns else 0
    frames = {"first": first, "count": count, "columns": of_frames}
    return ImageChange(header={**header, "maps": maps, "frames": frames}, payload=packing.whole())
