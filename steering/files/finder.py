"""Finds the parts of a layout in an HDF5 file."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from steering.files.hdf5 import Hdf5
from steering.files.layouts import At
from steering.files.units import factor, impossible


class Finder:
    """Finds the parts of a layout in a file."""

    def __init__(self, file: Hdf5) -> None:
        self.file = file

    def first(self, paths: tuple[str, ...]) -> list[Any]:
        """The datasets of the first path that is there: several where it has a * or leads to a group."""
        for path in paths:
            nodes = self.all(path)
            if nodes:
                return nodes
        return []

    def all(self, path: str) -> list[Any]:
        """The datasets of a path."""
        head, star, tail = path.partition("*")
        if not star:
            nodes: list[Any] = [self.file.find(path)]
        else:
            folder, _, prefix = head.rpartition("/")
            end, _, inner = tail.partition("/")
            group = self.file.find(folder)
            nodes = self.file.members(group, f"{prefix}*{end}") if isinstance(group, h5py.Group) else []
            nodes = [self.file.find(f"{n.name}/{inner}", n.file) for n in nodes] if inner else nodes
        found = []
        for node in nodes:
            if isinstance(node, h5py.Group):
                found += [n for n in self.file.members(node) if isinstance(n, h5py.Dataset)]
            elif node is not None:
                found.append(node)
        return found

    def value(self, at: At, name: str, found: dict[str, Any]) -> float | None:
        """A number of the optics in metres or joules; None where it is not there.

        name: as `units.impossible` has it. What was read where is put into found["said"], and what is wrong with it,
        for whoever takes it, into found["doubts"].
        """
        kind = "energy" if name == "energy" else "length"
        for path in at.paths:
            read = self._read(path, at.unit)
            if read is None:
                continue
            value, unit = read
            found["said"][name] = f"{path}: {value:.6g} {unit}"
            number = value * factor(unit, kind, path)
            if doubt := impossible(name, value, unit, path):
                found["doubts"][name] = doubt
            return number
        return None

    def _read(self, path: str, unit: str) -> tuple[float, str] | None:
        """The number at a path, and its unit: `unit` where the file says none."""
        where, is_attribute, attribute = path.partition("@")
        node = self.file.find(where) if where else self.file.file
        if node is None or not (is_attribute or isinstance(node, h5py.Dataset)):
            return None
        values = self.file.attribute_value(node, attribute) if is_attribute else self.file.read(node)
        if values is None or not np.size(values):
            return None
        try:
            value = float("a complex one" if np.iscomplexobj(values) else np.ravel(values)[0])
        except (TypeError, ValueError) as error:
            raise ValueError(f"found {path} of {np.asarray(values).dtype}, expected a real number") from error
        return value, unit if is_attribute else self.file.unit(node, unit)


def columns(values: NDArray[np.float64], name: str, frames: int | None = None) -> NDArray[np.float64]:
    """(n, 2), the first two coordinates of each frame.

    values: (..., 2 or 3), leading axes in the frames' order, or (2 or 3, n); axes of 1 count for nothing. frames: their
    number, which decides where both axes could be the coordinates. Raises ValueError for other shapes.
    """
    shape = values.shape
    plain = values.reshape([n for n in shape if n != 1] or [1])
    if plain.ndim == 1 and plain.size in (2, 3):
        plain = plain[None]  # of one frame
    if plain.ndim == 2:
        rows, across = plain.shape[1] in (2, 3), plain.shape[0] in (2, 3)
        if across and (not rows or plain.shape[1] == frames != plain.shape[0]):
            plain = plain.T
    elif plain.ndim > 2 and plain.shape[-1] in (2, 3):
        plain = plain.reshape(-1, plain.shape[-1])
    elif plain.ndim > 2 and plain.shape[0] in (2, 3):
        plain = plain.reshape(plain.shape[0], -1).T
    if plain.ndim != 2 or plain.shape[1] not in (2, 3):
        raise ValueError(
            f"found translations of shape {shape} in {name}, expected (frame, 3) or (frame, 2), (3, frame): x, y(, z)"
        )
    return plain[:, :2]
