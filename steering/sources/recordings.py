"""Recorded scans read from files: HDF5 in the CXI and NXcxi_ptycho layouts, and .npz.

Conventions, applied here once. A file's frames are turned by `orientation` about the zero frequency, which is then
brought to (y // 2, x // 2). Positions are (y, x) of the probe on the sample, relative to their mean. CXI stores where
the SAMPLE is, with x to the left seen along the beam and y up; the probe moves on the sample in the opposite direction,
and rows of an image run down and columns to the right, so that both signs cancel: (y, x) = (translation y, translation
x). Where a file has another convention, give `orientation`: frames turned by rot180 are positions with their signs
changed. Nothing is unpickled.
"""

from __future__ import annotations

import bz2
import io
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import hdf5plugin  # noqa: F401 - registers the compression filters that detectors write with
import numpy as np
from numpy.typing import NDArray

from steering.ptychography import Canvas, RefineSettings, aim_probe, extract_patches, refine, rescale_probe
from steering.records import Field, Geometry
from steering.sources.orientation import turn

_DATA = ("entry_1/data_1/data", "entry_1/instrument_1/detector_1/data")
_POSITIONS = (
    "entry_1/data_1/translation",
    "entry_1/sample_1/geometry_1/translation",
    "entry_1/instrument_1/detector_1/translation",
)
_INSTRUMENT = "entry_1/instrument_1"
_PROBES = tuple(f"{_INSTRUMENT}/{n}" for n in ("source_1/probe", "source_1/illumination", "detector_1/probe"))
_UNITS = {
    "m": 1.0,
    "mm": 1e-3,
    "um": 1e-6,
    "µm": 1e-6,
    "nm": 1e-9,
    "J": 1.0,
    "eV": 1.602176634e-19,
    "keV": 1.602176634e-16,
}
_PLANCK_TIMES_C = 6.62607015e-34 * 299792458.0
"""Joule metres: wavelength = this / photon energy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """A scan as it was recorded."""

    counts: NDArray
    """(frame, y, x) in the file's dtype (whole floats as the smallest unsigned one), zero frequency at (y//2, x//2)."""
    positions: NDArray[np.float64]
    """(frame, 2) of (y, x) in `geometry.length_unit`, relative to their mean."""
    probe: NDArray[np.complex64] | None
    """(mode, y, x), power arbitrary; None where the file has none."""
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.counts.ndim != 3 or self.counts.shape[1:] != self.geometry.shape:
            raise ValueError(
                f"found frames of shape {self.counts.shape}, expected (frame, y, x) of {self.geometry.shape}"
            )
        if not len(self.counts):
            raise ValueError("found an empty scan, expected one frame or more: was it aborted before the first?")
        if self.positions.shape != (len(self.counts), 2):
            raise ValueError(
                f"found {len(self.counts)} frames and positions of shape {self.positions.shape}, "
                "expected one (y, x) for each frame"
            )
        if not np.isfinite(self.positions).all():
            lost = int((~np.isfinite(self.positions)).any(axis=1).sum())
            raise ValueError(
                f"found {lost} positions that are not finite, expected (y, x) of each frame: leave those out"
            )
        if self.probe is not None and self.probe.shape[1:] != self.geometry.shape:
            raise ValueError(
                f"found a probe of shape {self.probe.shape}, expected (mode, y, x) of {self.geometry.shape}"
            )
        if self.counts.dtype.kind not in "uif":
            raise ValueError(f"found frames of dtype {self.counts.dtype}, expected real counts (integers or floats)")
        self._refuse_bad_counts()

    def _refuse_bad_counts(self) -> None:
        bad = ~(np.isfinite(self.counts) & (self.counts >= 0)) & self.geometry.good()
        if bad.any():
            frame, y, x = np.argwhere(bad)[0]
            raise ValueError(
                f"found {self.counts[frame, y, x]} at pixel ({y}, {x}) of frame {frame} ({int(bad.sum())} such values "
                "in all), expected finite counts of 0 or more: mask such pixels or repair the file"
            )

    def fitted_probe(self) -> NDArray[np.complex64]:
        """The probe (mode, y, x), aimed and scaled as the counts say. Raises ValueError where there is none."""
        if self.probe is None:
            raise ValueError("found a recording without a probe, expected one: give read_recording(..., probe=...)")
        mask = self.geometry.mask
        return rescale_probe(aim_probe(self.probe, self.counts, mask), self.counts, mask)

    def labels(self, *, patch: int, passes: int) -> tuple[NDArray[np.complex64], NDArray[np.complex64]]:
        """Patches (frame, patch, patch), cut out of the object that all frames refine to in so many passes, and the
        probe (mode, y, x) of these. Raises ValueError where there is no probe to begin with."""
        where = self.positions / self.geometry.object_pixel
        (y0, x0), (y1, x1) = where.min(0), where.max(0)
        canvas = Canvas.around(Field(y0, y1, x0, x1), self.geometry.shape[0])
        settings = RefineSettings(passes=passes, probe_from_pass=1)
        mask = self.geometry.mask
        refined = refine(self.counts, where, self.fitted_probe(), canvas, mask=mask, settings=settings)
        return extract_patches(refined.object, canvas, where, patch), refined.probe


def read_recording(
    path: str | Path,
    *,
    zero_frequency: str,
    orientation: str = "none",
    probe: NDArray[np.complex64] | None = None,
) -> Recording:
    """Read a recorded scan; what kind of file it is follows from its first bytes.

    zero_frequency: where it is in the FILE's frames, "corner" or "centre" (y // 2, x // 2). orientation: a name of
    ORIENTATIONS, how the file's frames must be turned to agree with the positions. probe: (y, x) or (mode, y, x),
    instead of the file's. HDF5 gives lengths in metres; .npz (arrays data, probe, scan) gives object pixels.
    Raises OSError for a file that is missing, damaged or of no known kind, ValueError for one whose content does not
    make a scan.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"found no file {path}, expected a recorded scan: check the path")
    try:
        fields = _read(path)
        data, mask = _counts(fields["data"], fields.get("mask"))
        turned = turn(data, zero_frequency, orientation)
        mask = turn(mask[None], zero_frequency, orientation)[0]
        given = fields.get("probe") if probe is None else probe
        geometry = Geometry(
            shape=turned.shape[1:],
            wavelength=fields.get("wavelength"),
            distance=fields.get("distance"),
            detector_pixel=fields.get("detector_pixel"),
            mask=mask if mask.any() else None,
        )
        where = fields["positions"]
        readable = np.isfinite(where).all() and len(where) > 0  # Recording refuses the others
        return Recording(
            counts=turned,
            positions=where - where.mean(0) if readable else where,
            probe=None if given is None else _modes(given),
            geometry=geometry,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        start = file.read(8)
    try:
        if start == b"\x89HDF\r\n\x1a\n" or h5py.is_hdf5(path):
            with h5py.File(path, "r") as hdf5:
                return _read_cxi(hdf5)
        if start[:3] == b"BZh":
            with bz2.open(path) as packed:
                return _read_npz(io.BytesIO(packed.read()))
        if start[:2] == b"PK":
            with path.open("rb") as file:
                return _read_npz(file)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise OSError(
            f"{path}: found a truncated or damaged file ({error}), expected a whole one: copy it again"
        ) from error
    beginning = f"it starts with {start!r}" if start else "it is empty"
    raise OSError(
        f"{path}: found a file that is not HDF5, and no .npz or .npz.bz2 either ({beginning}), "
        "expected a recorded scan in one of these: check the path, or convert it"
    )


def _read_cxi(file: h5py.File) -> dict[str, Any]:
    translation = _numbers(_find(file, _POSITIONS, "positions"))
    if translation.ndim != 2 or translation.shape[1] not in (2, 3):
        raise ValueError(
            f"found translations of shape {translation.shape}, expected (frame, 3) or (frame, 2): x, y(, z)"
        )
    width, height = _number(file, "detector_1/x_pixel_size"), _number(file, "detector_1/y_pixel_size")
    if abs(height / width - 1) > 1e-3:
        raise ValueError(f"found detector pixels of {height} by {width} m, expected square ones: rebin")
    fields = {
        "data": _frames(_find(file, _DATA, "frames")),
        "positions": translation[:, [1, 0]],
        "wavelength": _wavelength(file),
        "distance": _number(file, "detector_1/distance"),
        "detector_pixel": width,
    }
    if f"{_INSTRUMENT}/detector_1/mask" in file:
        fields["mask"] = file[f"{_INSTRUMENT}/detector_1/mask"][()] != 0
    probes = [file[name][()] for name in _PROBES if name in file]
    fields["probe"] = next((probe for probe in probes if np.iscomplexobj(probe)), None)
    return fields


def _find(file: h5py.File, names: tuple[str, ...], what: str) -> h5py.Dataset | h5py.Group:
    for name in names:
        if name in file:
            return file[name]
    raise ValueError(f"found no {what}, expected them at one of {', '.join(names)} (a link to them may be broken)")


def _frames(node: h5py.Dataset | h5py.Group) -> NDArray:
    """(frame, y, x) from one dataset (a raster scan may have it 4-dimensional) or from a group with one per frame."""
    if isinstance(node, h5py.Group):
        names = sorted(node, key=lambda name: [int(n) for n in re.findall(r"\d+", name)] or [-1])
        blocks = [_frames(node[name]) for name in names]
        shapes = sorted({block.shape[1:] for block in blocks})
        if len(shapes) != 1:
            raise ValueError(f"found frames of shapes {shapes} in one scan ({node.name}), expected one shape for all")
        return np.concatenate(blocks)
    if node.dtype.kind == "O":
        raise ValueError(f"found frames of changing shape ({node.name} is ragged), expected one shape for all")
    if node.is_virtual:
        folder = Path(node.file.filename).parent
        missing = [
            v.file_name for v in node.virtual_sources() if v.file_name != "." and not (folder / v.file_name).exists()
        ]
        if missing:
            raise ValueError(f"found frames that are kept in {missing[0]}, which is not there: put it beside this file")
    data = node[()]
    return data[None] if data.ndim == 2 else data.reshape(-1, *data.shape[-2:])


def _wavelength(file: h5py.File) -> float:
    """Metres. NXcxi_ptycho keeps the machine's energy at source_1, where CXI has the photons', so beam_1 goes first."""
    for name in ("beam_1/incident_beam_energy", "beam_1/incident_energy", "source_1/energy"):
        if f"{_INSTRUMENT}/{name}" in file:
            wavelength = _PLANCK_TIMES_C / _number(file, name)
            break
    else:
        wavelength = _number(file, "source_1/wavelength")
    if not 1e-12 < wavelength < 1e-7:
        raise ValueError(
            f"found a wavelength of {wavelength:.3g} m, expected X-rays: check the unit of the energy in the file"
        )
    return wavelength


def _number(file: h5py.File, name: str) -> float:
    path = f"{_INSTRUMENT}/{name}"
    if path not in file:
        raise ValueError(f"found no {path}, expected it: positions are in metres, object pixels must be known: add it")
    return float(np.ravel(_numbers(file[path]))[0])


def _numbers(data: h5py.Dataset) -> NDArray[np.float64]:
    """The values of a dataset in SI units; without the attribute `units` they are in SI already."""
    unit = data.attrs.get("units", "")
    unit = unit.decode() if isinstance(unit, bytes) else str(unit)
    if unit and unit not in _UNITS:
        raise ValueError(f"found {data.name} in {unit!r}, expected one of {', '.join(_UNITS)}")
    return np.asarray(data[()], np.float64) * _UNITS.get(unit, 1.0)


def _read_npz(file: BinaryIO) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as arrays:
        missing = {"data", "scan"} - set(arrays.files)
        if missing:
            raise ValueError(
                f"found arrays {arrays.files}, expected data, scan (and probe): no {' and no '.join(missing)}"
            )
        data = _without_leading_ones(_array(arrays, "data"), 3)
        scan = _without_leading_ones(_array(arrays, "scan"), 2).astype(np.float64)
        return {"data": data, "positions": scan, "probe": _array(arrays, "probe") if "probe" in arrays.files else None}


def _array(arrays: Mapping[str, NDArray], name: str) -> NDArray:
    try:
        return arrays[name]
    except ValueError as error:
        raise ValueError(
            f"found Python objects in the array {name!r} (frames of changing shape, or pickled data), "
            "expected plain numbers of one shape: save the array anew, since nothing is unpickled here"
        ) from error


def _without_leading_ones(array: NDArray, ndim: int) -> NDArray:
    while array.ndim > ndim and array.shape[0] == 1:
        array = array[0]
    return array


def _modes(probe: NDArray) -> NDArray[np.complex64]:
    """(mode, y, x) from (y, x) or (..., mode, y, x)."""
    modes = _without_leading_ones(np.asarray(probe), 3).astype(np.complex64)
    return modes[None] if modes.ndim == 2 else modes


def _counts(data: NDArray, mask: NDArray | None) -> tuple[NDArray, NDArray[np.bool_]]:
    """Frames, in an unsigned dtype where they are whole counts, and the mask (y, x) of pixels without counts.

    Detectors mark such pixels by all ones (unsigned) or by a negative value in every frame (signed).
    """
    if data.ndim != 3:
        raise ValueError(f"found frames of shape {data.shape}, expected (frame, y, x)")
    shape = data.shape[1:]
    if mask is not None and mask.shape[-2:] != shape:
        raise ValueError(f"found a mask of {mask.shape}, expected the frames' {shape}")
    masks = np.zeros((1, *shape), bool) if mask is None else mask.reshape(-1, *shape)
    bad = np.logical_or.reduce(masks, axis=0)
    if not len(data) or data.dtype.kind not in "uif":
        return data, bad
    if data.dtype.kind == "u":
        return data, bad | (data == np.iinfo(data.dtype).max).any(0)
    bad |= (data < 0).all(0)
    good = data[:, ~bad]
    if not (np.isfinite(good) & (good >= 0)).all() or not (good == np.floor(good)).all():
        return data, bad
    largest = good.max(initial=0)
    fits = next((t for t in (np.uint8, np.uint16, np.uint32) if largest < np.iinfo(t).max), np.uint64)
    return np.where(bad, 0, data).astype(fits), bad
