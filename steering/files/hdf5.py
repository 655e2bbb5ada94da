"""HDF5 files from strangers: links are followed inside the allowed folders only, sizes are checked before reading.

HDF5 follows external links, external storage and virtual sources wherever they lead, and reads what it cannot find as
zeros. So each link is resolved here, each file is opened here, by its real path, and each dataset is checked before it
is read; what is missing is named. This module runs in a process of its own, see `isolated`.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from steering.files.bounds import Memory
from steering.files.units import decoded, factor

Node = Any
"""h5py.Dataset or h5py.Group: h5py has no types."""
_HOPS, _DEPTH, _MOST_FILES, _MOST_SOURCES, _MOST_MEMBERS = 32, 8, 2_000, 100_000, 1_000_000
_MOST_TEXT = 4096
_FILTERS = {
    1: "deflate", 4: "szip", 307: "bzip2", 32000: "lzf", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle",
    32013: "zfp", 32015: "zstd",
    32017: "SZ", 32018: "fcidecomp", 32019: "jpeg", 32024: "SZ3", 32026: "blosc2", 32028: "sperr",
}  # fmt: skip
_BEING_WRITTEN = ("already open for write", "unable to lock file", "consistency flags", "SWMR")


class Hdf5:
    """An HDF5 file and all it links to, read within memory's bound and the allowed folders."""

    def __init__(self, path: str | Path, memory: Memory, folders: Sequence[str] = ()) -> None:
        """Raises ValueError for a file that is being written, OSError for one that cannot be opened."""
        self.path = Path(path)
        self.memory = memory
        real = self.path.resolve()
        own = {self.path.absolute().parent.resolve(), real.parent}
        self.roots = sorted(own | {Path(folder).resolve() for folder in folders})
        # What HDF5 resolves by itself is then resolved in the scan's folder, whoever asks from wherever.
        os.chdir(real.parent)
        self._files: dict[Path, h5py.File] = {}
        self._checked: set[tuple[str, str]] = set()
        self.file = self._opened(real)

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def find(self, name: str, file: h5py.File | None = None) -> Node | None:
        """What a path leads to, through links of every kind; None where there is nothing.

        Raises ValueError for a link out of the allowed folders, OSError for one to a file that cannot be opened.
        """
        node: Node = (self.file if file is None else file)["/"]
        parts = _parts(name)
        hops = 0
        while parts:
            part = parts.pop(0)
            if not isinstance(node, h5py.Group):
                return None
            try:
                link = node.get(part, getlink=True)
            except TypeError as error:
                raise ValueError(f"found {name}, a link of an unknown kind, expected a plain one") from error
            if link is None:
                return None
            if isinstance(link, h5py.HardLink):
                try:
                    node = node[part]
                except KeyError as error:
                    raise OSError(f"{name} cannot be opened: {error}") from error
                continue
            hops += 1
            if hops > _HOPS:
                raise ValueError(
                    f"found {name}, links that lead through {_HOPS} others, expected fewer: do they circle?"
                )
            if isinstance(link, h5py.ExternalLink):
                node = self._linked(decoded(link.filename), node.file, f"the link {name}")["/"]
            elif link.path.startswith("/"):
                node = node.file["/"]
            parts = _parts(link.path) + parts
        return node if isinstance(node, h5py.Dataset | h5py.Group) else None

    def members(self, group: h5py.Group, pattern: str = "*") -> list[Node]:
        """What is in a group under names that match (a * stands for any characters), by the numbers in them."""
        if len(group) > _MOST_MEMBERS:
            raise ValueError(f"found {len(group)} members in {group.name}, expected at most {_MOST_MEMBERS}")
        wanted = re.compile(".*".join(map(re.escape, pattern.split("*"))))
        names = sorted(
            filter(wanted.fullmatch, group), key=lambda n: ([int(i) for i in re.findall(r"\d+", n)] or [-1], n)
        )
        found = [self.find(f"{group.name}/{name}", group.file) for name in names]
        lost = [name for name, node in zip(names, found, strict=True) if node is None]
        if lost:
            raise ValueError(f"found {group.name}/{lost[0]}, a link to nothing, expected a dataset: add it or the file")
        return [node for node in found if node is not None]

    def shape(self, dataset: h5py.Dataset) -> tuple[int, ...]:
        """Its shape, once all it is made of has been checked. Raises as `read`."""
        self.check(dataset)
        if dataset.shape is None:
            raise ValueError(f"found nothing in {dataset.name}, expected numbers")
        return tuple(map(int, dataset.shape))

    def read(self, dataset: h5py.Dataset, out: NDArray | None = None) -> NDArray:
        """The values of a dataset, into `out` where given.

        Raises ValueError for values that are no plain numbers, too large, compressed by a filter that is not there, or
        kept in a file that is missing or outside the allowed folders.
        """
        shape, fields = self.shape(dataset), _complex_fields(dataset.dtype)
        if out is None:
            dtype = dataset.dtype if fields is None else np.result_type(fields[0], np.complex64)
            out = self.memory.empty(shape, dtype, str(dataset.name))
        if out.size:
            dataset.read_direct(out if fields is None else out.view(fields))
        return out

    def blocks(self, dataset: h5py.Dataset, rows: int) -> Iterator[NDArray]:
        """The values of a dataset, so many of its first axis at a time, in memory that is used again and is not
        counted. Raises as `read`."""
        shape = self.shape(dataset)
        block = np.empty((min(rows, shape[0]), *shape[1:]), dataset.dtype.newbyteorder("="))
        for start in range(0, shape[0] if block.size else 0, len(block)):
            part = block[: shape[0] - start]
            dataset.read_direct(part, np.s_[start : start + len(part)])
            yield part

    def unit(self, dataset: h5py.Dataset, unit: str) -> str:
        """The unit that the file says of its values, or else `unit`."""
        return self.attribute(dataset, "units") or self.attribute(dataset, "unit") or unit

    def numbers(self, dataset: h5py.Dataset, kind: str, unit: str) -> NDArray[np.float64]:
        """Its values in metres or joules; unit: in which they are."""
        values = self.read(dataset)
        if values.dtype.kind not in "uif":
            raise ValueError(f"found {dataset.name} of {values.dtype}, expected real numbers")
        return values.astype(np.float64) * factor(unit, kind, str(dataset.name))

    def attribute(self, node: Node, name: str) -> str:
        """A short text, or a number as text; empty where there is none."""
        return decoded(value) if (value := self.attribute_value(node, name)) is not None else ""

    def attribute_value(self, node: Node, name: str) -> Any:
        """The value of a small attribute; None where there is none, or it is of another kind."""
        if name not in node.attrs:
            return None
        kept = h5py.h5a.open(node.id, name.encode())
        if kept.get_storage_size() > _MOST_TEXT or not _plain(kept.get_type(), texts=True):
            return None
        return node.attrs[name]

    def check(self, dataset: h5py.Dataset, depth: int = 0) -> None:
        """Refuse a dataset that must not be read, before its size is believed. Raises as `read`."""
        key = (dataset.file.filename, str(dataset.name))
        if key in self._checked:
            return
        if depth > _DEPTH:
            raise ValueError(f"found {dataset.name}, virtual datasets {_DEPTH} deep, expected fewer")
        if not _plain(dataset.id.get_type()):
            raise ValueError(
                f"found {dataset.name} of another type than numbers (of changing shape, text or objects), "
                "expected plain numbers of one shape for all"
            )
        made = dataset.id.get_create_plist()
        _refuse_unknown_filters(made, str(dataset.name))
        if made.get_layout() == h5py.h5d.VIRTUAL:
            self._check_virtual(dataset, made, depth)
        for i in range(made.get_external_count()):
            name = decoded(made.get_external(i)[0])
            if not self._found(name, dataset.file, f"{dataset.name} in external storage"):
                raise ValueError(f"found {dataset.name} kept in {name}, which is not there: put it beside this file")
        self._checked.add(key)

    def _check_virtual(self, dataset: h5py.Dataset, made: h5py.h5p.PropDCID, depth: int) -> None:
        if made.get_virtual_count() > _MOST_SOURCES:
            raise ValueError(f"found {dataset.name} made of {made.get_virtual_count()} sources, too many")
        for i in range(made.get_virtual_count()):
            file_name, name = decoded(made.get_virtual_filename(i)), decoded(made.get_virtual_dsetname(i))
            spaces = made.get_virtual_vspace(i), made.get_virtual_srcspace(i)
            printf = re.search(r"(?<!%)%(\d*)b", file_name + name) is not None
            for block in range(_MOST_FILES if printf else 1):
                here, inside = _filled_in(file_name, block), _filled_in(name, block)
                if printf and block and here != "." and not self._found(here, dataset.file, f"{dataset.name}"):
                    break
                self._check_source(dataset, here, inside, spaces, depth)
                if printf and here == ".":
                    break  # blocks within one file: HDF5 ends at the first that is not there

    def _check_source(self, dataset: h5py.Dataset, file_name: str, name: str, spaces: Any, depth: int) -> None:
        file = dataset.file if file_name == "." else self._linked(file_name, dataset.file, f"{dataset.name}")
        source = self.find(name, file)
        if not isinstance(source, h5py.Dataset):
            raise ValueError(
                f"found {dataset.name} made of {name} in {file_name}, which has none: put the right file there"
            )
        self.check(source, depth + 1)
        wanted, here = spaces
        try:
            count = wanted.get_select_npoints()
        except RuntimeError:  # unlimited: HDF5 takes what the source has
            return
        if source.shape is None:
            return
        if here.get_select_type() == h5py.h5s.SEL_ALL:
            whole = math.prod(source.shape) == count
        else:
            last = here.get_select_bounds()[1]
            whole = h5py.h5s.UNLIMITED in last or all(n < m for n, m in zip(last, source.shape, strict=False))
        if not whole:
            raise ValueError(
                f"found {dataset.name} made of {name} in {file_name}, which is only {source.shape}: it is not whole; "
                "copy it again"
            )

    def _linked(self, name: str, file: h5py.File, what: str) -> h5py.File:
        found = self._found(name, file, what)
        if not found:
            raise ValueError(f"found {what} kept in {name}, which is not there: put it beside this file")
        try:
            return self._opened(found[0])
        except OSError as error:
            raise ValueError(
                f"found {what} kept in {name}, which cannot be opened ({error}): it is damaged; copy it again"
            ) from error

    def _found(self, name: str, file: h5py.File, what: str) -> list[Path]:
        """The files that HDF5 could mean by a name, real paths, the first first. Raises ValueError for one outside."""
        folder = Path(file.filename).parent
        prefixes = [os.environ.get(n, "") for n in ("HDF5_VDS_PREFIX", "HDF5_EXT_PREFIX", "HDF5_EXTFILE_PREFIX")]
        places = [Path(p.replace("${ORIGIN}", str(folder))) for p in prefixes if p] + [folder, Path.cwd()]
        given = Path(name)
        tried = [given] if given.is_absolute() else []
        tried += [place / (given.name if given.is_absolute() else given) for place in places]
        real = [path.resolve() for path in tried if path.exists()]
        for path in real:
            if not any(path.is_relative_to(root) for root in self.roots):
                raise ValueError(
                    f"found {what} kept in {path}, outside {', '.join(map(str, self.roots))}: nothing is read there. "
                    "If it is to be trusted, allow that folder (Bounds(folders=...), --allow-folder)"
                )
        return list(dict.fromkeys(real))

    def _opened(self, path: Path) -> h5py.File:
        if path not in self._files:
            if len(self._files) >= _MOST_FILES:
                raise ValueError(f"found links to more than {_MOST_FILES} files, expected fewer")
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError(f"found {path}, which is no regular file, expected HDF5")
            try:
                self._files[path] = h5py.File(path, "r")
            except OSError as error:
                if any(words in str(error) for words in _BEING_WRITTEN):
                    raise ValueError(
                        f"found {path.name} that is being written, or whose writer did not close it, expected a "
                        "finished file: wait, or follow it with swmr:FILE"
                    ) from error
                raise
        return self._files[path]


def _parts(path: str | bytes) -> list[str]:
    return [part for part in decoded(path).split("/") if part not in ("", ".")]


def _filled_in(pattern: str, block: int) -> str:
    return re.sub(r"%(\d*)b|%%", lambda m: "%" if m[0] == "%%" else f"{block:0{int(m[1] or 1) % 32}d}", pattern)


def _plain(kind: h5py.h5t.TypeID, *, texts: bool = False) -> bool:
    """Whether values of a type are numbers, bools or complex numbers (or texts): never objects, references, tags."""
    allowed: tuple[int, ...] = (h5py.h5t.INTEGER, h5py.h5t.FLOAT)
    if kind.get_class() == h5py.h5t.COMPOUND:
        members = range(kind.get_nmembers())
        return all(kind.get_member_class(i) == h5py.h5t.FLOAT for i in members) and {
            kind.get_member_name(i) for i in members
        } in ({b"r", b"i"}, {b"real", b"imag"})
    if kind.get_class() == h5py.h5t.ENUM:
        return bool(kind.get_super().get_class() == h5py.h5t.INTEGER)
    native_complex = getattr(h5py.h5t, "COMPLEX", None)
    return kind.get_class() in (
        *allowed,
        *((h5py.h5t.STRING,) if texts else ()),
        *((native_complex,) if native_complex else ()),
    )


def by_matlab(node: Node) -> bool:
    """Whether MATLAB wrote it, which keeps the first axis last: x goes before y."""
    return "MATLAB_class" in node.attrs


def _complex_fields(dtype: np.dtype) -> np.dtype | None:
    """How complex numbers as MATLAB writes them are read into an array of such; None: h5py knows what these are."""
    if dtype.names is None:
        return None
    part = np.result_type(np.float32, *(dtype[name] for name in dtype.names))
    return np.dtype([("real", part), ("imag", part)])


def _refuse_unknown_filters(made: h5py.h5p.PropDCID, name: str) -> None:
    numbers = [made.get_filter(i)[0] for i in range(made.get_nfilters())]
    if any(number > 255 for number in numbers):
        import hdf5plugin  # noqa: PLC0415, F401 - registers what detectors write with, where it is needed
    for number in numbers:
        if not h5py.h5z.filter_avail(number):
            called = _FILTERS.get(number, "a filter of unknown name")
            raise ValueError(
                f"found {name} compressed with {called} (HDF5 filter {number}), which is not installed: put its plugin "
                "into HDF5_PLUGIN_PATH, or write the file anew with h5repack -f NONE where it is"
            )
