"""Finds the parts of a layout in an HDF5 file."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from steering.files.hdf5 import Hdf5
from steering.files.layouts import At
from steering.files.units import factor


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

    def value(self, at: At, kind: str, said: dict[str, str], name: str) -> float | None:
        """A number in metres or joules; None where it is not there."""
        for path in at.paths:
            where, is_attribute, attribute = path.partition("@")
            node = self.file.find(where) if where else self.file.file
            if node is None:
                continue
            if is_attribute:
                value = self.file.attribute_value(node, attribute)
                if value is None:
                    continue
                number = float(np.ravel(value)[0]) * factor(at.unit, kind, path)
            elif hasattr(node, "dtype"):
                values = self.file.numbers(node, kind, at.unit)
                if not values.size:
                    continue
                number = float(np.ravel(values)[0])
            else:
                continue
            said[name] = path
            return number
        return None


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
