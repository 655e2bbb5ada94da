"""Frames on disk before they are acknowledged, for sources that cannot give them again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xarray as xr

from steering.campaign import Event, WorkFailed
from steering.records import Geometry, chunk_geometry, make_chunk
from steering.records.npz import read_arrays, write_arrays

logger = logging.getLogger(__name__)

_SUFFIX = ".npz"


class Spool:
    """Writes every chunk before it is sent. A disk that takes nothing costs what is spooled, not the run; that is said
    once."""

    def __init__(self, folder: Path | None, *, put: Callable[[Event], None]) -> None:
        """folder: None: nothing is written. put: where it is said."""
        self._folder, self._put = folder, put
        self.failed = 0
        """Frames that could not be written."""

    async def write(self, chunk: xr.Dataset) -> None:
        """Write a chunk, in a thread of its own."""
        if self._folder is None:
            return
        try:
            await asyncio.to_thread(write_spooled, self._folder, chunk)
        except OSError as error:
            if not self.failed:
                self._put(WorkFailed(time=time.time(), what="spooling frames", error=str(error), traceback=""))
            self.failed += chunk.sizes["frame"]


def write_spooled(folder: Path, chunk: xr.Dataset) -> None:
    """Write a chunk into the folder, under the lowest id of its frames. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    geometry = chunk_geometry(chunk)
    arrays = {name: chunk[name].values for name in ("counts", "mask", "frame", "position_y", "position_x")}
    lengths = (geometry.wavelength, geometry.distance, geometry.detector_pixel, *geometry.origin)
    numbers = (*lengths, chunk.attrs["acquired"])
    arrays["numbers"] = np.array([np.nan if number is None else number for number in numbers])
    for name in ("scan", "visit_of"):
        arrays[name] = np.frombuffer(str(chunk.attrs.get(name, "")).encode(), np.uint8)
    write_arrays(folder / f"{int(chunk['frame'].values.min()):012d}{_SUFFIX}", arrays)


def spooled(folder: Path | None, known: Callable[[int], bool] = lambda first: False) -> Iterator[xr.Dataset]:
    """The chunks in a folder, by the ids of their frames; what cannot be read is logged and left out.

    known: of the lowest id of a chunk, whether it need not be read.
    """
    for path in sorted((folder or Path("nowhere")).glob(f"[0-9]*{_SUFFIX}")):
        try:
            if not known(int(path.stem)):
                yield _chunk(read_arrays(path))
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s: spooled frames cannot be read: %s", path, error)


def drop_spooled(folder: Path, before: float) -> None:
    """Remove the files that were written before that time, seconds since the epoch."""
    for path in folder.glob(f"[0-9]*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # it is of no use, and does no harm
            if path.stat().st_mtime < before:
                path.unlink()


def _chunk(arrays: dict[str, np.ndarray]) -> xr.Dataset:
    *lengths, acquired = (None if np.isnan(number) else float(number) for number in arrays["numbers"])
    wavelength, distance, pixel, *origin = lengths
    mask = arrays["mask"].astype(bool)
    geometry = Geometry(
        shape=mask.shape,
        wavelength=wavelength,
        distance=distance,
        detector_pixel=pixel,
        mask=mask,
        origin=(origin[0] or 0.0, origin[1] or 0.0) if origin else (0.0, 0.0),
    )
    where = np.stack([arrays["position_y"], arrays["position_x"]], axis=1)
    scan, visited = (arrays[name].tobytes().decode() for name in ("scan", "visit_of"))
    chunk = make_chunk(arrays["counts"], arrays["frame"], where, geometry, scan=scan, acquired=acquired or 0.0)
    if visited:
        chunk.attrs["visit_of"] = visited
    return chunk
