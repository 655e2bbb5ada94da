"""Reads one array of a file of any kind: a probe, say, that somebody has kept apart. In a process of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from steering.files.arrays import DAMAGED, read_npy, read_npz
from steering.files.bounds import Bounds, Memory
from steering.files.hdf5 import Hdf5, by_matlab


def read_array_file(
    path: str, memory: Memory, bounds: Bounds, *, names: list[str], named: bool = False
) -> dict[str, Any]:
    """`array`, one array of a .npy, .npz, .mat or HDF5 file: the first of `names` that is there, or the only one, but
    not where `named` says that somebody has named it.

    In HDF5 the names may be paths. Raises as `read_scan_file`.
    """
    place = Path(path)
    with place.open("rb") as file:
        start = file.read(8)
    try:
        if start == b"\x89HDF\r\n\x1a\n" or h5py.is_hdf5(path):
            return {"array": _from_hdf5(place, memory, bounds, names, named)}
        if start[:6] == b"\x93NUMPY":
            with place.open("rb") as file:
                return {"array": read_npy(file, memory, place.name, size=os.fstat(file.fileno()).st_size)}
        if start[:2] == b"PK":
            found, _ = read_npz(place, memory)
            return {"array": _chosen(found, names, named)}
        if start[:6] == b"MATLAB":
            found = _from_mat(place)
            return {"array": _chosen(found, names, named)}
    except DAMAGED as error:
        raise OSError(f"found a truncated or damaged file ({error}), expected a whole one: copy it again") from error
    raise OSError(f"found a file that starts with {start!r}, expected .npy, .npz, .mat or HDF5: convert it")


def _from_hdf5(path: Path, memory: Memory, bounds: Bounds, names: list[str], named: bool) -> NDArray:
    file = Hdf5(path, memory, bounds.folders)
    try:
        nodes = [node for name in names if isinstance(node := file.find(name), h5py.Dataset)]
        if not nodes and not named:
            nodes = [node for name in file.file if isinstance(node := file.find(name), h5py.Dataset)]
            nodes = nodes if len(nodes) == 1 else []
        if not nodes:
            raise ValueError(f"found {sorted(file.file)[:20]}, expected {_expected(names)}")
        array = file.read(nodes[0])
        return array.T if by_matlab(nodes[0]) else array
    finally:
        file.close()


def _from_mat(path: Path) -> dict[str, NDArray]:
    import scipy.io  # noqa: PLC0415

    try:
        return {k: v for k, v in scipy.io.loadmat(path).items() if isinstance(v, np.ndarray)}
    except Exception as error:  # scipy raises of many kinds for damaged files
        raise OSError(f"it is no file of MATLAB 5 to 7.2: {error}") from error


def _chosen(found: dict[str, NDArray], names: list[str], named: bool) -> NDArray:
    for name in names:
        if name in found:
            return found[name]
    if len(found) == 1 and not named:
        return next(iter(found.values()))
    raise ValueError(f"found arrays {sorted(found)[:20]}, expected {_expected(names)}")


def _expected(names: list[str]) -> str:
    return f"one of {', '.join(names)}: name it, as FILE:/path"
