"""Reads a recorded scan as plain arrays and numbers in SI units, whatever its layout, and says what was recognised.

This runs in a process of its own, see `isolated`. What the values mean together (frames with positions, a probe that
fits) is judged by `steering.sources`, outside.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from steering.files.arrays import DAMAGED, read_npz, unpacked_bz2
from steering.files.bounds import Bounds, Memory
from steering.files.finder import Finder, columns
from steering.files.hdf5 import Hdf5, by_matlab
from steering.files.layouts import LAYOUTS, WRITTEN, Layout
from steering.files.masks import take_mask
from steering.files.raster import channels, each
from steering.files.stacks import take_stack
from steering.files.tables import TextTable, table_count, table_positions
from steering.files.units import PLANCK_TIMES_C, factor


def read_scan_file(
    path: str,
    memory: Memory,
    bounds: Bounds,
    *,
    given: Mapping[str, str] | None = None,
    look: bool = False,
    mask: str = "file",
) -> dict[str, Any]:
    """What a file holds of a scan.

    given: `frames` or `positions` from elsewhere: FILE:/path[unit], positions also FILE:/x,/y[unit]; a FILE is beside
    the scan or in an allowed folder. look: only shapes of what is large, for `steering inspect`. mask: as
    `ReadSettings` has it.
    Returns `layout`; `frames` (..., y, x), `numbers` (n,) of them where they are not all of the file's in its order;
    `amplitude`; `positions` (n, 2) of (y, x); `length` "m" or "object pixel"; `units`, in which positions were, where
    that was said; `wavelength`, `distance`, `detector_pixel`, `object_pixel` in metres; `mask` (y, x), True = bad in
    nearly every frame (where it is in fewer, these have a flag there); `probe`; `said`, a dictionary of what was read
    where; `notes`, sentences on what was taken for what; `doubts`, a dictionary of what is wrong with numbers that
    cannot be. Those that are not there are missing, and named in `missing`.
    Raises ValueError for content that cannot be a scan, OSError for a file that is missing, damaged or unknown.
    """
    place, given = Path(path), dict(given or {})
    with place.open("rb") as file:
        start = file.read(8)
    if given and start[:2] in (b"BZ", b"PK"):
        raise ValueError(f"found {' and '.join(given)} given for a .npz file, expected them in it, as data and scan")
    try:
        if start == b"\x89HDF\r\n\x1a\n" or h5py.is_hdf5(path):
            return _read_hdf5(place, memory, bounds, given, look=look, mask=mask)
        if start[:3] == b"BZh":
            return _read_arrays(unpacked_bz2(place, memory), memory, look)
        if start[:2] == b"PK":
            return _read_arrays(place, memory, look)
    except DAMAGED as error:
        raise OSError(f"found a truncated or damaged file ({error}), expected a whole one: copy it again") from error
    beginning = f"it starts with {start!r}" if start else "it is empty"
    raise OSError(
        f"found a file that is not HDF5, and no .npz or .npz.bz2 either ({beginning}), "
        "expected a recorded scan in one of these: check the path, or convert it"
    )


def _read_arrays(file: Any, memory: Memory, look: bool) -> dict[str, Any]:
    arrays, names = read_npz(file, memory, {"data", "scan", "probe"})
    missing = {"data", "scan"} - set(names)
    if missing:
        raise ValueError(
            f"found arrays {names}, expected data, scan (and probe): no {' and no '.join(sorted(missing))}"
        )
    scan = _without_leading_ones(arrays["scan"], 2)
    if scan.ndim != 2 or scan.shape[1] != 2 or scan.dtype.kind not in "uif":
        raise ValueError(f"found the array scan of {scan.dtype} {scan.shape}, expected real (frame, 2): y, x")
    said = {name: f"{name} {array.dtype} {array.shape}" for name, array in arrays.items()}
    found = {"layout": "npz", "frames": _without_leading_ones(arrays["data"], 3), "amplitude": False, "said": said}
    found |= {"positions": scan.astype(np.float64), "length": "object pixel"}
    found |= {"missing": [], "notes": [], "doubts": {}}
    if "probe" in arrays:
        found["probe"] = arrays["probe"]
    return {k: v for k, v in found.items() if not (look and k in ("frames", "probe"))}


def _read_hdf5(
    path: Path, memory: Memory, bounds: Bounds, given: dict[str, str], *, look: bool, mask: str
) -> dict[str, Any]:
    main = Hdf5(path, memory, bounds.folders)
    files = [main]
    try:
        layout = _recognised(Finder(main))
        if layout is None and "frames" not in given:
            wanted = dict.fromkeys(path for one in LAYOUTS for path in one.frames)
            raise ValueError(
                f"found no frames, expected them at one of {_some(wanted)}: say where, frames=FILE:/path (--frames)"
            )
        layout = layout or Layout(name="frames as said", frames=())
        rest = main
        if layout.pair is not None:
            rest = Hdf5(_partner(path, layout.pair), memory, bounds.folders)
            files.append(rest)
        reader = Finder(main), Finder(rest)
        found: dict[str, Any] = {"layout": layout.name, "amplitude": layout.amplitude}
        found |= {"said": {}, "missing": [], "notes": [], "doubts": {}}
        for name, text in given.items():
            _take_given(found, name, text, path, memory, bounds, look=look)
        _take_frames(found, layout, reader[0], look)
        _take_mask(found, layout, reader[1], mask, look)
        _take_given_positions(found)
        _match_numbers(found, layout, reader[1])
        _take_positions(found, layout, reader[1])
        _leave_unwritten(found, reader[0])
        _take_numbers(found, layout, reader[1])
        _take_probe(found, layout, reader[1], look)
        if nodes := reader[1].first(layout.dark):
            found["notes"].append(f"the dark in {nodes[0].name} is subtracted only where it is given (--dark {path})")
        found.pop("raster", None)
        return found
    finally:
        for file in files:
            file.close()


def _recognised(reader: Finder) -> Layout | None:
    """The first layout whose frames and positions are there, or whose frames are."""
    fitting = [one for one in LAYOUTS if reader.first(one.frames)]
    for one in fitting:
        apart = reader.first(one.x.paths) and reader.first(one.y.paths)
        if one.pair is not None or reader.first(one.positions.paths) or apart:
            return one
    return fitting[0] if fitting else None


def _partner(path: Path, pair: tuple[str, str]) -> Path:
    stem, here, there = path.stem, *pair
    partner = path.with_name(stem[: -len(here)] + there + path.suffix) if stem.endswith(here) else path
    if not stem.endswith(here) or not partner.is_file():
        raise ValueError(
            f"found frames and no {partner.name if stem.endswith(here) else f'*{here}{path.suffix} in its name'}, "
            f"expected a pair NAME{here}{path.suffix}, NAME{there}{path.suffix}: put both into one folder"
        )
    return partner


def _take_frames(found: dict[str, Any], layout: Layout, reader: Finder, look: bool) -> None:
    if "frames" in found or "shape" in found:
        return
    nodes = reader.first(layout.frames)
    many, shape = 1, reader.file.shape(nodes[0]) if len(nodes) == 1 else ()
    if len(shape) == 4 and layout.name.startswith("NeXus"):
        many, note = channels(shape[0], shape[1], _counted(found, layout, reader))
        found["notes"] += [note] if note else []
    found["said"]["frames"] = take_stack(found, nodes, reader.file, look=look, many=many)


def _counted(found: dict[str, Any], layout: Layout, reader: Finder) -> tuple[int, ...]:
    """How many positions there are, or values in y and in x; empty where it is not known."""
    if "positions" in found:
        return (len(found["positions"]),)
    if "pair" in found:
        y, x = found["pair"]
        return len(y), len(x)
    if "table" in found:
        return (table_count(found["table"][0], named=bool(found["table"][1])),)
    sizes = [sum(math.prod(reader.file.shape(node)) for node in reader.first(at.paths)) for at in (layout.y, layout.x)]
    return tuple(sizes) if all(sizes) else ()


def _take_positions(found: dict[str, Any], layout: Layout, reader: Finder) -> None:
    if "positions" in found:
        return
    found["length"] = "m"
    nodes = reader.first(layout.positions.paths)
    if nodes:
        unit, count = layout.positions.unit, _frame_count(found) if len(nodes) == 1 else None
        blocks = [columns(one, str(nodes[0].name), count) for one in _lengths(nodes, reader.file, found, unit)]
        where = np.concatenate(blocks, axis=0) if len(blocks) > 1 else blocks[0]
        found["said"]["positions"] = nodes[0].name
        found["positions"] = where[:, ::-1] if layout.order == "xy" else where
        return
    pair = [(reader.first(at.paths), at.unit) for at in (layout.y, layout.x)]
    if all(nodes for nodes, _ in pair):
        y, x = (
            np.concatenate([one.ravel() for one in _lengths(nodes, reader.file, found, unit)]) for nodes, unit in pair
        )
        found["positions"] = each(y, x, _frame_count(found), found.get("raster", ()))
        found["said"]["positions"] = f"{pair[0][0][0].name}, {pair[1][0][0].name}"
        return
    wanted = [path for at in (layout.positions, layout.y, layout.x) for path in at.paths]
    found["missing"].append(
        f"no positions, expected them at one of {_some(wanted) or 'the places of a known layout'} (a link may "
        "be broken): say where, positions=FILE:/path[unit] (--positions)"
    )


def _match_numbers(found: dict[str, Any], layout: Layout, reader: Finder) -> None:
    """Frames in the order of the positions, where the file says of which frame each position is."""
    nodes = reader.first(layout.numbers)
    if not nodes or "positions" in found:
        return
    frames, numbers = _frame_count(found), np.asarray(reader.file.read(nodes[0])).ravel()
    if np.array_equal(numbers, np.arange(frames)):
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


def _frame_count(found: dict[str, Any]) -> int:
    return int(found["shape"][0] if "shape" in found else len(found["frames"]))


def _lengths(nodes: list[Any], file: Hdf5, found: dict[str, Any], unit: str, *, sure: bool = False) -> list[NDArray]:
    """Positions in metres, an array of each dataset. unit: where the file says none; sure: in any case."""
    units = [unit if sure else file.unit(node, unit) for node in nodes]
    found["units"] = sorted({*found.get("units", ()), *units})
    return [file.numbers(node, "length", one) for node, one in zip(nodes, units, strict=True)]


def _take_numbers(found: dict[str, Any], layout: Layout, reader: Finder) -> None:
    wavelength = reader.value(layout.wavelength, "wavelength", found)
    if wavelength is None:
        energy = reader.value(layout.energy, "energy", found)
        wavelength = PLANCK_TIMES_C / energy if energy else None
    tall = reader.value(layout.pixel_y, "detector_pixel", found)
    pixel = reader.value(layout.pixel, "detector_pixel", found)
    if pixel and tall and abs(tall / pixel - 1) > 1e-3:
        raise ValueError(f"found detector pixels of {tall} by {pixel} m, expected square ones: rebin")
    values = {"wavelength": wavelength, "distance": reader.value(layout.distance, "distance", found)}
    values |= {"detector_pixel": pixel, "object_pixel": reader.value(layout.object_pixel, "object_pixel", found)}
    if values["distance"] is not None:
        values["distance"] = abs(values["distance"])  # some count it from the detector
    found |= {name: value for name, value in values.items() if value is not None}
    if values["object_pixel"] is not None:
        return
    for name, ats in {
        "wavelength": (layout.wavelength, layout.energy),
        "distance": (layout.distance,),
        "detector_pixel": (layout.pixel,),
    }.items():
        if values[name] is None:
            places = _some([path for at in ats for path in at.paths])
            found["missing"].append(
                f"no {name.replace('_', ' ')} ({places or 'this layout has no place for it'}), expected it: lengths "
                f"are in metres, object pixels must be known: give it ({_OPTIONS[name]})"
            )


def _some(places: Collection[str]) -> str:
    """The first of some places in a file: errors are read in a line."""
    first, more = list(places)[:3], len(list(places)) - 3
    return ", ".join(first) + (f" and {more} others" if more > 0 else "")


_OPTIONS = {"wavelength": "--energy", "distance": "--distance", "detector_pixel": "--pixel"}


def _take_mask(found: dict[str, Any], layout: Layout, reader: Finder, mask: str, look: bool) -> None:
    """The mask, while the frames are all of the file's and in its order."""
    nodes = reader.first(layout.mask)
    if not nodes:
        return
    found["said"]["mask"] = f"{nodes[0].name} ({layout.mask_rule})"
    if not look and mask != "none":
        take_mask(found, nodes, reader.file, layout.mask_rule, inverted=mask == "inverted")


def _take_probe(found: dict[str, Any], layout: Layout, reader: Finder, look: bool) -> None:
    for path in layout.probe:
        node = reader.file.find(path)
        if node is not None and hasattr(node, "dtype") and node.dtype.kind == "c":
            found["said"]["probe"] = f"{path} {node.dtype} {node.shape}"
            if not look:
                probe = reader.file.read(node)
                found["probe"] = probe.T if by_matlab(node) else probe
            return


def _take_given(
    found: dict[str, Any], name: str, text: str, path: Path, memory: Memory, bounds: Bounds, *, look: bool
) -> None:
    """`frames` or `positions` from FILE:/path[unit]; FILE may be left out for the scan itself."""
    place, unit = [*text[:-1].rsplit("[", 1), "m"][:2] if text.endswith("]") else (text, "m")
    file_name, colon, inside = place.rpartition(":")
    if not colon and name == "positions":
        file_name, inside = place, ""
    elif not colon:
        raise ValueError(f"found {name} at {text!r}, expected FILE:/path or FILE:/path[unit]")
    there = path if not file_name else (path.parent / file_name)
    if not there.is_file():
        raise ValueError(f"found {name} at {text!r}, and no file {there}, expected it: check the path")
    if name == "positions" and not h5py.is_hdf5(there):
        found["table"] = (there, inside, unit, text)  # it is read when the number of frames is known
        return
    # Who gives a file by name trusts its folder: links inside it are followed there.
    file = Hdf5(there, memory, bounds.folders)
    try:
        parts = []
        for one in inside.split(","):
            nodes = Finder(file).first((one.strip("/"),))
            if not nodes:
                top = ", ".join(sorted(file.file)[:20])
                raise ValueError(f"found no {one} in {there.name}, which has {top}, expected {name} there: name it")
            parts.append(nodes)
        if name == "frames":
            said = take_stack(found, [node for nodes in parts for node in nodes], file, look=look)
            found["said"][name] = f"{there.name}: {said}"
            return
        found["said"][name], found["length"] = text, "m"
        values = [np.concatenate(_lengths(nodes, file, found, unit, sure=text.endswith("]"))) for nodes in parts]
        if len(values) == 2:
            found["pair"] = values[1].ravel(), values[0].ravel()
        else:
            found["positions"] = columns(values[0], inside)[:, ::-1]
    finally:
        file.close()
        os.chdir(path.resolve().parent)


def _leave_unwritten(found: dict[str, Any], reader: Finder) -> None:
    """Leave out frames that were never written, where the file says which."""
    nodes = reader.first(WRITTEN)
    if not nodes or nodes[0].dtype.kind not in "iu":
        return
    written = reader.file.read(nodes[0]).ravel() != 0
    frames = math.prod(found["shape"][:-2]) if "shape" in found else math.prod(found["frames"].shape[:-2])
    if written.all() or len(written) != frames:
        return
    found["said"]["written"] = f"{nodes[0].name}: {int((~written).sum())} frames are not, and left out"
    if len(found.get("positions", ())) == frames:
        found["positions"] = found["positions"][written]
    if "shape" in found:
        found["shape"] = [int(written.sum()), *found["shape"][-2:]]
    else:
        found["frames"] = found["frames"].reshape(-1, *found["frames"].shape[-2:])[written]
        found["numbers"] = found.get("numbers", np.arange(frames))[written]


def _take_given_positions(found: dict[str, Any]) -> None:
    """Positions that are given, as two arrays or in a text file, once the number of frames is known."""
    frames, raster = _frame_count(found), found.get("raster", ())
    if "pair" in found:
        y, x = found.pop("pair")
        found["positions"] = each(y, x, frames, raster)
    if "table" not in found:
        return
    there, inside, unit, text = found.pop("table")
    found["length"] = "m"
    if not inside:
        given = unit if text.endswith("]") else None
        found["positions"], found["said"]["positions"], used = table_positions(there, frames, given)
        found["units"] = [used]
        return
    names = [one.strip("/") for one in inside.split(",")]
    if len(names) != 2:
        raise ValueError(f"found positions at {text!r}, expected FILE:/x,/y[unit], two columns of the table")
    table = TextTable(there)
    x, y = (table.column(name) * factor(unit, "length", there.name) for name in names)
    found["positions"], found["said"]["positions"], found["units"] = each(y, x, frames, raster), text, [unit]


def _without_leading_ones(array: NDArray, ndim: int) -> NDArray:
    while array.ndim > ndim and array.shape[0] == 1:
        array = array[0]
    return array
