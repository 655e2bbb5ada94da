"""Probes that are kept in files, and probes that were made for whole frames of which a window is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steering.files import Bounds, isolated_array
from steering.sources.frames import binned, centre_of_light
from steering.sources.window import Window, placed

_PROBE_NAMES = (
    "probe",
    "Probe",
    "entry_1/instrument_1/source_1/probe",
    "entry_1/instrument_1/source_1/illumination",
    "entry_1/instrument_1/detector_1/probe",
    "content/probe/Sscan_00G00/data",
)
_TRIES = 10


def read_probe(path: str | Path, *, bounds: Bounds | None = None) -> NDArray[np.complex64]:
    """A probe (mode, y, x) from a .npy, .npz, .mat or HDF5 file, at FILE:/path or under a usual name. Of three axes y
    and x are the two that are equal: MATLAB's (y, x, mode) is read too. Raises as `read_recording`."""
    found = isolated_array(path, _PROBE_NAMES, bounds)
    try:
        if found.dtype.kind not in "cf" or found.ndim < 2:
            raise ValueError(f"found {found.dtype} {found.shape}, expected a complex probe (mode, y, x)")
        return modes_of(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def modes_of(probe: NDArray) -> NDArray[np.complex64]:
    """(mode, y, x) from (y, x), or from modes along any axis: that which is not as long as both others. Further axes
    of length 1 count for nothing; where all are equal the first one has the modes."""
    modes = np.asarray(probe)
    while modes.ndim > 3 and 1 in modes.shape:
        modes = modes.squeeze(modes.shape.index(1))
    modes = modes.astype(np.complex64)
    if modes.ndim != 3:
        return modes[None] if modes.ndim == 2 else modes
    alone = [axis for axis in range(3) if modes.shape.count(modes.shape[axis]) == 1]
    return np.ascontiguousarray(np.moveaxis(modes, alone[0], 0)) if len(alone) == 1 else modes


def fitted_probe(
    modes: NDArray[np.complex64], whole: tuple[int, int], counts: NDArray, bad: NDArray[np.bool_], binning: int
) -> NDArray[np.complex64]:
    """A probe (mode, y, x) that was made for whole frames, for the window that was cut out of them.

    whole: pixels (y, x) of a frame before it was cut. counts, bad: the frames (n, side, side) as they are cut and
    binned, and their mask. The probe's far field is cut where its light then falls as the frames' does: some programs
    leave the tilt of a beam beside the middle in the probe, and some do not. Where the window is the larger one, no
    light is beyond the whole frames.
    """
    side = counts.shape[1]
    if modes.ndim != 3 or modes.shape[1:] != whole or (whole == (side, side) and binning == 1):
        return modes
    far, axes = _far_field(modes), (-2, -1)
    nothing, wide = np.zeros(whole, bool), side * binning
    wanted = centre_of_light(counts, bad)
    at = centre_of_light(np.abs(far) ** 2, nothing) - (wanted - side // 2) * binning
    for _ in range(_TRIES):  # what the window leaves out of the light moves its centre
        y, x = np.clip(at, 0, np.array(whole) - 1).tolist()
        inside, place = Window(size=wide, centre=(y, x)).parts(whole)
        square, _ = placed(far[:, *inside], nothing[inside], place, wide)
        light, _ = binned(np.abs(square) ** 2, np.zeros((wide, wide), bool), binning)
        at = at + (centre_of_light(light, bad) - wanted) * binning
    near = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(square, axes=axes), norm="ortho"), axes=axes)
    low = (wide - side) // 2
    return near[:, low : low + side, low : low + side].astype(np.complex64)


def _far_field(modes: NDArray[np.complex64]) -> NDArray[np.complex64]:
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(modes, axes=axes), norm="ortho"), axes=axes)
