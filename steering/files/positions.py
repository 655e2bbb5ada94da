"""A scan's positions: where its layout has them, or where they are said to be, in HDF5 or in a text table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.files.finder import Finder, columns, some
from steering.files.hdf5 import Hdf5
from steering.files.layouts import At, Layout, Table
from steering.files.raster import each, refuse_other_grid
from steering.files.tables import named_columns, table_count, table_positions


@dataclass(frozen=True)
class Named:
    """A place that is given: FILE:/path[unit], FILE:/x,/y[unit], or FILE[unit] for a table."""

    text: str
    file: Path
    inside: tuple[str, ...]
    """Paths in the file, or columns of the table, without their leading slash; empty for a table as a whole."""
    unit: str | None
    """None: it is not said."""


def named(name: str, text: str, scan: Path) -> Named:
    """What a text says. name: `frames` or `positions`, of the file `scan`, which FILE left out means and beside which
    others are. Raises ValueError for another form and for a file that is not there."""
    place, unit = [*text[:-1].rsplit("[", 1), None][:2] if text.endswith("]") else (text, None)
    file_name, colon, inside = str(place).rpartition(":")
    if not colon and name == "positions":
        file_name, inside = str(place), ""
    elif not colon:
        raise ValueError(f"found {name} at {text!r}, expected FILE:/path or FILE:/path[unit]")
    there = scan if not file_name else scan.parent / file_name
    if not there.is_file():
        raise ValueError(f"found {name} at {text!r}, and no file {there}, expected it: check the path")
    return Named(text, there, tuple(one.strip("/") for one in inside.split(",") if inside), unit)


def among(place: str, paths: tuple[str, ...]) -> bool:
    """Whether a place is one of a layout's paths, or one that its * stands for."""
    return any(fnmatchcase(place, path) for path in paths)


def give_positions(found: dict[str, Any], given: Named, file: Hdf5, owner: Layout | None) -> None:
    """Read positions that are given in HDF5, for `take_positions`.

    owner: the layout of that file: its own places keep their order and unit, and what goes with them. Raises ValueError
    for positions that are not there or are no lengths.
    """
    reader = Finder(file)
    nodes = [reader.named(one, "positions") for one in given.inside]
    if len(nodes) not in (1, 2):
        raise ValueError(f"found positions at {given.text!r}, expected FILE:/path[unit] or FILE:/x,/y[unit]")
    layout = owner or Layout(name="", frames=())
    ats = [layout.positions] if len(nodes) == 1 else [layout.x, layout.y]
    own = all(among(one, at.paths) for one, at in zip(given.inside, ats, strict=True))
    blocks = [
        _lengths(parts, file, found, given.unit or (at.unit if own else "m"), sure=given.unit is not None)
        for parts, at in zip(nodes, ats, strict=True)
    ]
    found["said"]["positions"] = given.text
    found["given"] = blocks if len(blocks) == 1 else blocks[::-1]
    found["names"] = given.inside[::-1]
    found["columns"] = layout.order if own else "xy"
    found["axes"] = found.get("axes", {}) | reader.axes(given.inside[0])
    mine = {path for at in (layout.positions, layout.x, layout.y) for path in at.paths}
    found["owner"] = owner if all(among(one, tuple(mine)) for one in given.inside) else None
    if found["owner"] is not None:
        _read_angle(found, layout.angle, reader, layout.other_beyond)


def counted(found: dict[str, Any], layout: Layout, reader: Finder) -> tuple[int, ...]:
    """How many positions there are, or values in y and in x; empty where it is not known."""
    if "given" in found:
        alone, words = len(found["given"]) == 1, found["said"]["positions"]
        return tuple(
            sum(len(columns(one, words)) if alone else one.size for one in blocks) for blocks in found["given"]
        )
    if "table" in found:
        return (table_count(found["table"].file, found["table"].inside),)
    sizes = [sum(math.prod(reader.file.shape(n)) for n in _nodes(reader, at)) for at in (layout.y, layout.x)]
    return tuple(sizes) if all(sizes) else ()


def take_positions(found: dict[str, Any], layout: Layout, main: Finder, rest: Finder) -> None:
    """Put positions (n, 2) of (y, x) into `found`, and frames into the order that the layout's own say.

    main, rest: the file of the frames, and that of all else. Raises ValueError for those that make no positions.
    """
    if "table" in found:
        found["owner"] = None
        _match_numbers(found, layout, rest)
        _from_table(found, main)
    else:
        if "given" not in found:
            _find(found, layout, rest)
        if "given" not in found:
            return
        _match_numbers(found, layout, rest)
        _place(found)
    found["length"] = "m"
    _foreshorten(found, layout, rest)


def _find(found: dict[str, Any], layout: Layout, reader: Finder) -> None:
    """Positions where the layout has them, as `give_positions` puts them."""
    ats, places = [layout.positions], [reader.place(layout.positions.paths)]
    if not places[0]:
        ats, places = [layout.y, layout.x], [_place_of(reader, at) for at in (layout.y, layout.x)]
    nodes = [reader.all(one) for one in places]
    if not all(nodes):
        wanted = [path for at in (layout.positions, layout.y, layout.x) for path in at.paths]
        found["missing"].append(
            found.get("partner")
            or f"no positions, expected them at one of {some(wanted) or 'the places of a known layout'} (a link may "
            "be broken): say where, positions=FILE:/path[unit] (--positions)"
        )
        return
    found["given"] = [_lengths(parts, reader.file, found, at.unit) for parts, at in zip(nodes, ats, strict=True)]
    found["said"]["positions"] = ", ".join(str(parts[0].name) for parts in nodes)
    found["names"], found["columns"], found["owner"] = places, layout.order, layout
    found["axes"] = found.get("axes", {}) | reader.axes(places[0])
    _read_angle(found, layout.angle, reader, layout.other_beyond)


def _place_of(reader: Finder, at: At) -> str:
    """Where y or x of each frame is: a single value is where a motor stood, and counts if there is nothing else."""
    return reader.place(at.paths, 2) or reader.place(at.paths)


def _nodes(reader: Finder, at: At) -> list[Any]:
    return reader.all(_place_of(reader, at))


def _place(found: dict[str, Any]) -> None:
    """Positions of each frame from the arrays that were found."""
    given, frames, raster = found["given"], frame_count(found), found.get("raster", ())
    words, axes = found["said"]["positions"], [found["axes"].get(n.rpartition("/")[2], ()) for n in found["names"]]
    for blocks, along in zip(given, axes, strict=True):
        if len(blocks) == 1 and blocks[0].ndim == len(along) == 2 and along[0] > along[1]:
            blocks[0] = blocks[0].T
    for one in [blocks[0] for blocks in given if len(blocks) == 1]:
        refuse_other_grid(_grid(one.shape, of_both=len(given) == 1), raster, words)
    if len(given) == 1:
        [blocks] = given
        where = np.concatenate([columns(one, words, frames if len(blocks) == 1 else None) for one in blocks])
        found["positions"] = where[:, ::-1] if found["columns"] == "xy" else where
        return
    y, x = (np.concatenate([one.ravel() for one in blocks]) for blocks in given)
    told = all(len(along) == 1 for along in axes) and axes[0] != axes[1]
    order = ("yx" if axes[0] < axes[1] else "xy") if told else ""
    found["positions"], note = each(y, x, frames, raster, order)
    found["notes"] += [note] if note else []


def _grid(shape: tuple[int, ...], *, of_both: bool) -> tuple[int, ...]:
    """The axes of positions that are frames. of_both: one axis has y and x, the last or the first."""
    plain = tuple(n for n in shape if n != 1)
    if not of_both:
        return plain
    return plain[:-1] if len(plain) > 1 and plain[-1] in (2, 3) else plain[1:]


def _from_table(found: dict[str, Any], main: Finder) -> None:
    given: Named = found["table"]
    kind: Table | None
    if not given.inside:
        found["positions"], found["said"]["positions"], used, kind = table_positions(
            given.file, frame_count(found), given.unit
        )
        found["units"] = [used]
    elif len(given.inside) != 2:
        raise ValueError(f"found positions at {given.text!r}, expected FILE:/x,/y[unit], two columns of the table")
    else:
        x, y, kind, note = named_columns(given.file, given.inside, given.unit or "m")
        found["positions"], more = each(y, x, frame_count(found), found.get("raster", ()))
        found["said"]["positions"], found["units"] = given.text, [given.unit or "m"]
        found["notes"] += [one for one in (note, more) if one]
    if kind is not None:
        _read_angle(found, kind.angle, main)


def _read_angle(found: dict[str, Any], at: At, reader: Finder, other_beyond: float | None = None) -> None:
    angle = reader.value(at, "angle", found)
    if angle is not None:
        found["turned"] = angle, other_beyond


def _foreshorten(found: dict[str, Any], layout: Layout, reader: Finder) -> None:
    """Positions as the beam sees them, where the stage is turned about the vertical axis."""
    if "turned" not in found:
        angle = reader.value(layout.angle, "angle", found) if found.get("owner") is None else None
        if angle:
            found["notes"].append(
                f"the stage is turned by {math.degrees(angle):.4g} degrees ({found['said']['angle']}): positions that "
                "are given are taken as the beam sees them"
            )
        return
    angle, beyond = found["turned"]
    degrees = math.degrees(angle)
    other = beyond is not None and not -beyond < degrees <= beyond
    scale = math.sin(angle) if other else math.cos(angle)
    if scale != 1:
        found["positions"] = found["positions"] * (1.0, scale)
        found["notes"].append(
            f"the stage is turned by {degrees:.4g} degrees ({found['said']['angle']}): x is {scale:.4g} times what the "
            "file has"
        )


def _match_numbers(found: dict[str, Any], layout: Layout, reader: Finder) -> None:
    """Frames in the order of the positions, where the file says of which frame each position is."""
    nodes = reader.first(layout.numbers)
    if not nodes:
        return
    frames, numbers = frame_count(found), np.asarray(reader.file.read(nodes[0])).ravel()
    if np.array_equal(numbers, np.arange(frames)):
        return
    if found["owner"] is not layout:
        found["notes"].append(
            f"{nodes[0].name} says of which frames this file's own positions are, in another order than the frames'; "
            "those that are given are taken in the frames' order"
        )
        return
    known = numbers.dtype.kind in "iuf" and bool(np.isin(numbers, np.arange(frames)).all())
    if not known or len(np.unique(numbers)) != len(numbers):
        raise ValueError(
            f"found numbers of frames in {nodes[0].name} that are not of 0 to {frames - 1}, or twice the same, "
            "expected the frame of each position: do the files belong together?"
        )
    found["said"]["frames"] += f", of which {len(numbers)} have positions, in the order of {nodes[0].name}"
    if "shape" in found:
        found["shape"] = [len(numbers), *found["shape"][-2:]]
    else:
        images = found["frames"].reshape(-1, *found["frames"].shape[-2:])
        found["numbers"] = numbers.astype(np.int64)
        found["frames"] = images[found["numbers"]]


def frame_count(found: dict[str, Any]) -> int:
    """How many frames were found."""
    return int(found["shape"][0] if "shape" in found else len(found["frames"]))


def _lengths(nodes: list[Any], file: Hdf5, found: dict[str, Any], unit: str, *, sure: bool = False) -> list[NDArray]:
    """Positions in metres, an array of each dataset. unit: where the file says none; sure: in any case."""
    units = [unit if sure else file.unit(node, unit) for node in nodes]
    found["units"] = sorted({*found.get("units", ()), *units})
    return [file.numbers(node, "length", one) for node, one in zip(nodes, units, strict=True)]
