"""`steering export`: what a run has left, written for other programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.files.export import OPTICS, ScanExport, write_cxi, write_tiffs
from steering.models import ModelStore
from steering.runner.folder import RunFolder


def export_run(folder: RunFolder, out: Path) -> list[Path]:
    """Write each scan of a run as OUT/SCAN.cxi and its images as OUT/SCAN-NAME.tif. Returns their paths.

    Raises ValueError for a run without images, OSError.
    """
    scans = folder.objects()
    if not scans:
        raise ValueError(f"{folder.path}: found no images, expected a scan that was saved: let the run save one first")
    out.mkdir(parents=True, exist_ok=True)
    probe, written = _probe(folder), []
    for name, image in scans.items():
        scan = _of(image, probe)
        write_cxi(out / f"{name}.cxi", scan)
        written += [out / f"{name}.cxi", *write_tiffs(out, name, scan)]
    return written


def _of(image: xr.Dataset, probe: NDArray[np.complex64] | None) -> ScanExport:
    maps = {str(name): value for name, value in image.data_vars.items() if value.dims == ("y", "x")}
    columns = {str(name): value.values for name, value in image.data_vars.items() if value.dims == ("frame",)}
    if "position_y_refined" in columns:  # those of the refined object; the recorded ones stay beside them
        where = np.stack([columns.pop("position_y_refined"), columns.pop("position_x_refined")], axis=1)
    else:
        where = np.stack([columns.pop("position_y"), columns.pop("position_x")], axis=1)
    refined = image.get("probe_refined")
    return ScanExport(
        images={name: value.values for name, value in maps.items()},
        units={name: str(value.attrs.get("units", "1")) for name, value in maps.items()},
        y=image["y"].values,
        x=image["x"].values,
        unit=str(image.attrs.get("length_unit", "object pixel")),
        positions=where,
        origin=tuple(image.attrs.get("origin", (0.0, 0.0))),
        frames=columns | {"frame_id": image["frame"].values},
        probe=probe if refined is None else refined.values,
        optics={name: float(image.attrs[name]) for name in OPTICS if name in image.attrs},
    )


def _probe(folder: RunFolder) -> NDArray[np.complex64] | None:
    """(mode, y, x) of the newest version, for scans without a refined one; None before the first version, and for a
    network that keeps none."""
    store = ModelStore(folder.models)
    number = store.newest()
    kept = None if number is None else store.weights(number).get("optics.probe")
    if kept is None:
        return None
    real = kept.numpy()
    return (real[..., 0] + 1j * real[..., 1]).astype(np.complex64)
