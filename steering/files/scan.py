"""Reads a recorded scan as plain arrays and numbers in SI units, whatever its layout, and says what was recognised.

This runs in a process of its own, see `isolated`. What the values mean together (frames with positions, a probe that
fits) is judged by `steering.sources`, outside.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from steering.files.arrays import DAMAGED, read_npz, unpacked_bz2
from steering.files.bounds import Bounds, Memory
from steering.files.finder import Finder, recognised, some
from steering.files.hdf5 import Hdf5, by_matlab
from steering.files.layouts import LAYOUTS, WRITTEN, Layout
from steering.files.masks import take_mask
from steering.files.positions import Named, among, counted, frame_count, give_positions, named, take_positions
from steering.files.raster import channels
from steering.files.stacks import take_stack
from steering.files.units import PLANCK_TIMES_C


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
    meant = {"data": "frames", "scan": "positions", "probe": "probe"}
    said = {meant[name]: f"{name} {array.dtype} {array.shape}" for name, array in arrays.items()}
    found = {"layout": "npz", "frames": _without_leading_ones(arrays["data"], 3), "amplitude": False, "said": said}
    found |= {"positions": scan.astype(np.float64), "length": "object pixel"}
    found |= {"missing": [], "notes": [], "doubts": {}}
    if "probe" in arrays:
        found["probe"] = arrays["probe"]
    _compare_counts(found, look=look)
    return {k: v for k, v in found.items() if not (look and k in ("frames", "probe"))}


def _read_hdf5(
    path: Path, memory: Memory, bounds: Bounds, given: dict[str, str], *, look: bool, mask: str
) -> dict[str, Any]:
    main = Hdf5(path, memory, bounds.folders)
    files = [main]
    try:
        layout = recognised(Finder(main))
        if layout is None and "frames" not in given:
            wanted = dict.fromkeys(path for one in LAYOUTS for path in one.frames)
            raise ValueError(
                f"found no frames, expected them at one of {some(wanted)}: say where, frames=FILE:/path (--frames)"
            )
        layout = layout or Layout(name="frames as said", frames=())
        found: dict[str, Any] = {"layout": layout.name, "amplitude": layout.amplitude}
        found |= {"said": {}, "missing": [], "notes": [], "doubts": {}, "unread": {}}
        rest = main
        if layout.pair is not None and (partner := _partner(found, path, layout.pair)) is not None:
            rest = Hdf5(partner, memory, bounds.folders)
            files.append(rest)
        reader = Finder(main), Finder(rest)
        for name in ("positions", "frames"):  # how many positions there are tells a raster from channels
            if name in given:
                _take_given(found, name, given[name], files, bounds, layout, look=look)
        _take_frames(found, layout, reader[0], look)
        _take_mask(found, layout, reader[1], look=look, mask=mask)  # while frames are all of the file's, in its order
        take_positions(found, layout, *reader)
        _leave_unwritten(found, reader[0])
        _take_numbers(found, layout, reader[1])
        _take_probe(found, layout, reader[1], look=look)
        if nodes := reader[1].first(layout.dark):
            found["notes"].append(f"the dark in {nodes[0].name} is subtracted only where it is given (--dark {path})")
        _compare_counts(found, look=look)
        return {name: value for name, value in found.items() if name not in _OF_READING}
    finally:
        for file in files:
            file.close()


_OF_READING = ("raster", "axes", "given", "names", "columns", "owner", "table", "turned", "partner", "unread")
"""What is found on the way to positions and numbers."""


def _partner(found: dict[str, Any], path: Path, pair: tuple[str, str]) -> Path | None:
    """The second file of a pair; None, and what to say of it, where it is not there: all that it has may be given."""
    stem, here, there = path.stem, *pair
    named_so = stem.endswith(here)
    partner = path.with_name(stem[: -len(here)] + there + path.suffix)
    if named_so and partner.is_file():
        return partner
    found["partner"] = (
        f"no {partner.name if named_so else f'*{here}{path.suffix} in the name of these frames'}, "
        f"expected a pair NAME{here}{path.suffix}, NAME{there}{path.suffix}: put both into one folder, or give "
        "positions and optics (--positions, --energy, --distance, --pixel)"
    )
    return None


def _take_frames(found: dict[str, Any], layout: Layout, reader: Finder, look: bool) -> None:
    if "frames" in found or "shape" in found:
        return
    place = reader.place(layout.frames)
    nodes = reader.all(place)
    found["axes"] = reader.axes(place) | found.get("axes", {})
    many = _channels(found, nodes, layout, reader)
    found["said"]["frames"] = take_stack(found, nodes, reader.file, look=look, many=many)


def _channels(found: dict[str, Any], nodes: list[Any], layout: Layout, reader: Finder) -> int:
    """How many channels of the detector each frame has, with a note on what was taken."""
    shape = reader.file.shape(nodes[0]) if len(nodes) == 1 else ()
    if len(shape) != 4 or not layout.name.startswith("NeXus"):
        return 1
    many, note = channels(shape[0], shape[1], counted(found, layout, reader))
    found["notes"] += [note] if note else []
    return many


def _take_numbers(found: dict[str, Any], layout: Layout, reader: Finder) -> None:
    unread = found["unread"]
    wavelength = reader.value(layout.wavelength, "wavelength", found)
    if wavelength is None and "wavelength" not in unread:
        energy = reader.value(layout.energy, "energy", found)
        wavelength = PLANCK_TIMES_C / energy if energy else None
        unread |= {"wavelength": unread.pop("energy")} if "energy" in unread else {}
    tall = reader.value(layout.pixel_y, "detector_pixel", found)
    pixel = reader.value(layout.pixel, "detector_pixel", found)
    if pixel and tall and abs(tall / pixel - 1) > 1e-3:
        square = f"found detector pixels of {tall} by {pixel} m, expected square ones: rebin, and give them (--pixel)"
        found["doubts"].setdefault("detector_pixel", square)
    values = {"wavelength": wavelength, "distance": reader.value(layout.distance, "distance", found)}
    values |= {"detector_pixel": pixel, "object_pixel": _object_pixel(found, layout, reader)}
    if values["distance"] is not None:
        values["distance"] = abs(values["distance"])  # some count it from the detector
    found |= {name: value for name, value in values.items() if value is not None}
    for name, ats in {
        "wavelength": (layout.wavelength, layout.energy),
        "distance": (layout.distance,),
        "detector_pixel": (layout.pixel,),
    }.items():
        if values[name] is None and values["object_pixel"] is None:
            places = some([path for at in ats for path in at.paths])
            why = f"that can be read ({unread.pop(name)})" if name in unread else f"({places or _NO_PLACE})"
            found["missing"].append(
                f"no {name.replace('_', ' ')} {why}, expected it: lengths are in metres, object pixels must be known: "
                f"give it ({_OPTIONS[name]})"
            )
    found["notes"] += [f"{name.replace('_', ' ')} cannot be read: {why}" for name, why in unread.items()]


def _object_pixel(found: dict[str, Any], layout: Layout, reader: Finder) -> float | None:
    """Along x, metres, where a file keeps it; a doubt where that along y is none of the same detector."""
    tall = reader.value(layout.object_pixel_y, "object_pixel", found)
    pixel = reader.value(layout.object_pixel, "object_pixel", found)
    if pixel and tall:
        ny, nx = found["shape"][-2:] if "shape" in found else found["frames"].shape[-2:]
        if abs(tall * ny / (pixel * nx) - 1) > _SAME:
            found["doubts"]["object_pixel"] = (
                f"found object pixels of {tall:.4g} by {pixel:.4g} m (y, x) for frames of {ny} by {nx} pixels, "
                f"expected {pixel * nx / ny:.4g} m in y, as square detector pixels make them: rebin, or repair the file"
            )
    return pixel


_SAME = 0.02
"""Pixels along y and x may differ so much."""
_NO_PLACE = "this layout has no place for it"
_OPTIONS = {"wavelength": "--energy", "distance": "--distance", "detector_pixel": "--pixel"}


def _take_mask(found: dict[str, Any], layout: Layout, reader: Finder, *, look: bool, mask: str) -> None:
    if mask == "none":
        return
    try:
        nodes = reader.first(layout.mask, 1)
        if not nodes:
            return
        found["said"]["mask"] = f"{nodes[0].name} ({layout.mask_rule})"
        if not look:
            take_mask(found, nodes, reader.file, layout.mask_rule, inverted=mask == "inverted")
    except (OSError, ValueError) as error:
        why = str(error) if str(error).startswith("found") else f"found a mask that cannot be read ({error}): copy it"
        found["doubts"]["mask"] = f"{why}, or leave the mask out (--mask none)"
        if not look:
            raise ValueError(found["doubts"]["mask"]) from error


def _take_probe(found: dict[str, Any], layout: Layout, reader: Finder, *, look: bool) -> None:
    for path in layout.probe:
        try:
            node = reader.file.find(path)
            if node is None or not hasattr(node, "dtype") or node.dtype.kind != "c":
                continue
            found["said"]["probe"] = f"{path} {node.dtype} {node.shape}"
            if not look:
                probe = reader.file.read(node)
                found["probe"] = probe.T if by_matlab(node) else probe
        except (OSError, ValueError) as error:
            found["said"].pop("probe", None)
            found["notes"].append(f"the file's probe cannot be read: {error}")
        return


def _compare_counts(found: dict[str, Any], *, look: bool) -> None:
    """Whether there is a position for each frame: for a `look` a doubt, else an error."""
    if "positions" not in found:
        return
    frames, positions = frame_count(found), len(found["positions"])
    if positions == frames or not frames:
        return
    few = min(frames, positions)
    if found["layout"] == "npz":
        cut = "keep these of both arrays, data and scan"
    elif few < positions:
        cut = f"write rows 0 to {few - 1} of x and y into a text file, and give it (--positions FILE:/0,/1[unit])"
    else:
        cut = f"write frames 0 to {few - 1} into an HDF5 file, and give it (--frames FILE:/path)"
    found["doubts"]["count"] = (
        f"found {frames} frames and positions of shape {found['positions'].shape}, expected one (y, x) for each frame: "
        f"if the first {few} belong together, as of a scan that was ended early, {cut}"
    )
    if not look:
        raise ValueError(found["doubts"]["count"])


def _take_given(
    found: dict[str, Any], name: str, text: str, files: list[Hdf5], bounds: Bounds, layout: Layout, *, look: bool
) -> None:
    """`frames` or `positions` from FILE:/path[unit]; FILE may be left out for the scan itself."""
    main = files[0]
    given = named(name, text, main.path)
    if name == "positions" and not h5py.is_hdf5(given.file):
        found["table"] = given  # it is read when the number of frames is known
        return
    # Who gives a file by name trusts its folder: links inside it are followed there.
    file = Hdf5(given.file, main.memory, bounds.folders)
    try:
        own = given.file.resolve() in {one.path.resolve() for one in files}
        owner = layout if own else recognised(Finder(file))
        if name == "positions":
            give_positions(found, given, file, owner)
        else:
            _take_given_frames(found, given, Finder(file), owner, look=look)
    finally:
        file.close()
        os.chdir(main.path.resolve().parent)


def _take_given_frames(
    found: dict[str, Any], given: Named, reader: Finder, owner: Layout | None, *, look: bool
) -> None:
    """Frames that are given. owner: the layout of their file: its own place of frames keeps what they are."""
    nodes = [node for one in given.inside for node in reader.named(one, "frames")]
    own = owner if owner is not None and all(among(one, owner.frames) for one in given.inside) else None
    amplitude = own is not None and own.amplitude
    if found["amplitude"] and not amplitude:
        found["notes"].append(
            f"frames at {given.text} are taken as counts; at its own place {found['layout']} has amplitudes"
        )
    found["amplitude"] = amplitude
    found["axes"] = reader.axes(given.inside[0]) | found.get("axes", {})
    many = 1 if own is None else _channels(found, nodes, own, reader)
    found["said"]["frames"] = f"{given.file.name}: {take_stack(found, nodes, reader.file, look=look, many=many)}"


def _leave_unwritten(found: dict[str, Any], reader: Finder) -> None:
    """Leave out frames that were never written, where the file says which."""
    try:
        nodes = reader.first(WRITTEN)
        if not nodes or nodes[0].dtype.kind not in "iu":
            return
        written = reader.file.read(nodes[0]).ravel() != 0
    except (OSError, ValueError) as error:
        found["notes"].append(f"which frames were written cannot be read, all are taken: {error}")
        return
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


def _without_leading_ones(array: NDArray, ndim: int) -> NDArray:
    while array.ndim > ndim and array.shape[0] == 1:
        array = array[0]
    return array
