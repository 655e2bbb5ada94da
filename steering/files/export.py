"""Writes what a run has left of a scan for other programs: HDF5 in the CXI and NeXus manner, and TIFF images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.files.units import PLANCK_TIMES_C

OPTICS = ("wavelength", "distance", "detector_pixel")
Image = NDArray[np.float32]
_SHOWN = ("phase_refined", "phase")
"""The image that a viewer opens first: the first of these that is there."""
_CLASSES = {
    "sample_1": "NXsample",
    "sample_1/geometry_1": "NXcollection",
    "instrument_1": "NXinstrument",
    "instrument_1/source_1": "NXsource",
    "instrument_1/detector_1": "NXdetector",
    "frames": "NXcollection",
}
"""Of groups that are no images; viewers pass over those of none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanExport:
    """A scan's images and what belongs to its frames; lengths are in metres, or in object pixels."""

    images: Mapping[str, Image]
    """(y, x) each, by name, as in object.zarr: amplitude, phase, amplitude_refined, phase_refined, trust, ..."""
    y: NDArray[np.float64]
    x: NDArray[np.float64]
    """Of the rows and columns, ascending in even steps."""
    unit: str
    """`m` or `object pixel`."""
    units: Mapping[str, str]
    """Of each image."""
    positions: NDArray[np.float64]
    """(frame, 2) of (y, x), in the coordinates of the images."""
    origin: tuple[float, float] = (0.0, 0.0)
    """(y, x), added to positions and to y and x it makes them those of the stage."""
    frames: Mapping[str, NDArray] = field(default_factory=dict)
    """(frame,) each, by name."""
    probe: NDArray[np.complex64] | None = None
    """(mode, y, x), its pixels as large as the images'."""
    optics: Mapping[str, float] = field(default_factory=dict)
    """Those of OPTICS that are known, metres; distance: from sample to detector."""


def write_cxi(path: Path, scan: ScanExport) -> None:
    """Write a scan as HDF5: each pair of amplitude and phase as a complex image of CXI, each image as NXdata.

    The file appears whole. Raises OSError.
    """
    import h5py  # noqa: PLC0415 - steering.files is loaded without it

    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with h5py.File(draft, "w") as file:
            file["cxi_version"] = 160
            file.attrs.update(NX_class="NXroot", default="entry_1")
            entry = file.create_group("entry_1")
            entry.attrs["NX_class"] = "NXentry"
            shown = next((name for name in _SHOWN if name in scan.images), next(iter(scan.images), None))
            if shown is not None:
                entry.attrs["default"] = shown
            for number, (name, image) in enumerate(_complex(scan.images).items(), 1):
                group = entry.create_group(f"image_{number}")
                _nxdata(group, image, scan, name, "1")
                group["data_space"], group["data_type"] = "real", "complex"
            for name, values in scan.images.items():
                _nxdata(entry.create_group(name), values, scan, name, scan.units.get(name, "1"))
            xyz = np.c_[scan.positions[:, ::-1], np.zeros(len(scan.positions))]
            entry["sample_1/geometry_1/translation"] = xyz
            moved = entry["sample_1/geometry_1/translation"].attrs
            moved["units"], moved["origin"] = scan.unit, [scan.origin[1], scan.origin[0], 0.0]
            moved["description"] = "x, y, z in the coordinates of the images; with origin added, those of the stage"
            if scan.probe is not None:
                entry["instrument_1/source_1/probe"] = scan.probe
                _in_unit(entry, "instrument_1/source_1/probe_pixel", float(scan.y[1] - scan.y[0]), scan.unit)
            for name, value, unit in _optics(scan.optics):
                _in_unit(entry, f"instrument_1/{name}", value, unit)
            for name, column in scan.frames.items():
                entry[f"frames/{name}"] = column
            for name, kind in _CLASSES.items():
                if name in entry:
                    entry[name].attrs["NX_class"] = kind
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_tiffs(folder: Path, stem: str, scan: ScanExport) -> list[Path]:
    """Write each image as folder/STEM-NAME.tif in float32, with the size of a pixel. Returns their paths."""
    import tifffile  # noqa: PLC0415

    written = []
    step = float(scan.y[1] - scan.y[0]) if len(scan.y) > 1 else 1.0
    scale: dict[str, Any] = (
        {"resolution": (0.01 / step, 0.01 / step), "resolutionunit": "CENTIMETER"} if scan.unit == "m" else {}
    )
    for name, image in scan.images.items():
        path = folder / f"{stem}-{name}.tif"
        said = {"pixel": step, "pixel_unit": scan.unit, "value_unit": scan.units.get(name, "1"), "name": name}
        said |= {"y0": float(scan.y[0]), "x0": float(scan.x[0])}
        said |= {"origin_y": scan.origin[0], "origin_x": scan.origin[1]}
        tifffile.imwrite(path, np.asarray(image, np.float32), description=json.dumps(said), metadata=None, **scale)
        written.append(path)
    return written


def _complex(images: Mapping[str, Image]) -> dict[str, NDArray[np.complex64]]:
    found = {}
    for end, name in (("", "object, network alone"), ("_refined", "object, refined")):
        amplitude, phase = images.get(f"amplitude{end}"), images.get(f"phase{end}")
        if amplitude is not None and phase is not None:
            found[name] = (amplitude * np.exp(1j * phase)).astype(np.complex64)
    return found


def _optics(known: Mapping[str, float]) -> Iterator[tuple[str, float, str]]:
    """As CXI names them: SI units, the energy in joules."""
    if "wavelength" in known:
        yield "source_1/wavelength", known["wavelength"], "m"
        yield "source_1/energy", PLANCK_TIMES_C / known["wavelength"], "J"
    if "distance" in known:
        yield "detector_1/distance", known["distance"], "m"
    if "detector_pixel" in known:
        yield "detector_1/x_pixel_size", known["detector_pixel"], "m"
        yield "detector_1/y_pixel_size", known["detector_pixel"], "m"


def _in_unit(group: Any, name: str, value: float, unit: str) -> None:
    group[name] = value
    group[name].attrs["units"] = unit


def _nxdata(group: Any, values: NDArray, scan: ScanExport, name: str, unit: str) -> None:
    group.attrs.update(NX_class="NXdata", signal="data", axes=["y", "x"])
    group["title"] = name
    for key, array, units in (("data", values, unit), ("y", scan.y, scan.unit), ("x", scan.x, scan.unit)):
        group[key] = array
        group[key].attrs["units"] = units
