"""Probes that are kept in files, and probes that were made for whole frames of which a window is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steering.files import Bounds, isolated_array

_PROBE_NAMES = (
    "probe",
    "Probe",
    "entry_1/instrument_1/source_1/probe",
    "entry_1/instrument_1/source_1/illumination",
    "entry_1/instrument_1/detector_1/probe",
    "content/probe/Sscan_00G00/data",
)


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
    modes: NDArray[np.complex64], whole: tuple[int, ...], side: int, binning: int
) -> NDArray[np.complex64]:
    """A probe (mode, y, x) that was made for whole frames, for the window that was cut out of them."""
    if modes.ndim != 3 or modes.shape[1:] != whole or whole == (side, side):
        return modes
    n = [w // binning for w in whole]
    low = [w // 2 - m // 2 for w, m in zip(whole, n, strict=True)]
    modes = modes[:, low[0] : low[0] + n[0], low[1] : low[1] + n[1]]
    axes = (-2, -1)
    far = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(modes, axes=axes), norm="ortho"), axes=axes)
    low = [m // 2 - side // 2 for m in n]
    far = far[:, low[0] : low[0] + side, low[1] : low[1] + side]
    near = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(far, axes=axes), norm="ortho"), axes=axes)
    return near.astype(np.complex64)
