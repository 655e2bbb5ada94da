"""Finds the parts of a layout in an HDF5 file."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from steering.files.hdf5 import Hdf5
from steering.files.layouts import LAYOUTS, At, Layout
from steering.files.units import decoded, factor, impossible


class Finder:
    """Finds the parts of a layout in a file."""

    def __init__(self, file: Hdf5) -> None:
        self.file = file

    def first(self, paths: tuple[str, ...], least: int = 0) -> list[Any]:
        """The datasets of the first path that is there: several where it has a * or leads to a group. least: values
        that they have together; those with fewer count as not there."""
        return self.all(self.place(paths, least))

    def place(self, paths: tuple[str, ...], least: int = 0) -> str:
        """The first path that is there, as `first` takes it; empty where there is none."""
        for path in paths:
            nodes = self.all(path)
            if nodes and (not least or sum(node.size or 0 for node in nodes) >= least):
                return path
        return ""

    def named(self, path: str, what: str) -> list[Any]:
        """The datasets of a path that is given for frames or positions. Raises ValueError where it is not there."""
        nodes = self.all(path)
        if not nodes:
            top = ", ".join(sorted(self.file.file)[:20])
            raise ValueError(
                f"found no {path} in {self.file.path.name}, which has {top}, expected {what} there: name it"
            )
        return nodes

    def has(self, paths: tuple[str, ...]) -> bool:
        """Whether something is at one of the paths, be it a link to a file that cannot be read."""
        try:
            return bool(self.place(paths))
        except (OSError, ValueError):
            return True

    def axes(self, path: str) -> dict[str, tuple[int, ...]]:
        """Which axes of the frames the axes of positions are, by name, as the NXdata group of a path says: by its
        attribute `axes`, and by NAME_indices, which goes before it."""
        group = self.file.find(path.rpartition("/")[0])
        if not isinstance(group, h5py.Group):
            return {}
        names = self.file.attribute_value(group, "axes")
        found: dict[str, tuple[int, ...]] = {}
        for axis, name in enumerate([] if names is None else np.ravel(names)):
            found[decoded(name)] = (axis,)
        for attribute in group.attrs:
            name, is_index = attribute.removesuffix("_indices"), attribute.endswith("_indices")
            at = self.file.attribute_value(group, attribute) if is_index else None
            if at is not None and np.asarray(at).dtype.kind in "ui":
                found[name] = tuple(np.ravel(at).tolist())
        return found

    def all(self, path: str) -> list[Any]:
        """The datasets of a path; none of an empty one."""
        if not path:
            return []
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
        """A number of the optics in metres or joules, or an angle in radians; None where it is not there.

        name: as `units.impossible` has it, or `angle`. What was read where is put into found["said"], what is wrong
        with it, for whoever takes it, into found["doubts"], and why it cannot be read, where the first place that is
        there has no such number, into found["unread"].
        """
        kind = name if name in ("energy", "angle") else "length"
        for path in at.paths:
            try:
                read = self._read(path, at.unit)
                scale = 1.0 if read is None else factor(read[1], kind, path)
            except (OSError, ValueError) as error:
                found["unread"][name] = str(error)
                return None
            if read is None:
                continue
            value, unit = read
            found["said"][name] = f"{path}: {value:.6g} {unit}"
            if name != "angle" and (doubt := impossible(name, value, unit, path)):
                found["doubts"][name] = doubt
            return value * scale
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


def recognised(reader: Finder) -> Layout | None:
    """The first layout whose frames and positions are there, or whose frames are."""
    fitting = [one for one in LAYOUTS if reader.has(one.frames)]
    for one in fitting:
        apart = reader.has(one.x.paths) and reader.has(one.y.paths)
        if one.pair is not None or reader.has(one.positions.paths) or apart:
            return one
    return fitting[0] if fitting else None


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


def some(places: Collection[str]) -> str:
    """The first of some places in a file: errors are read in a line."""
    first, more = list(places)[:3], len(places) - 3
    return ", ".join(first) + (f" and {more} others" if more > 0 else "")
