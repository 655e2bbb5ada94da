"""Arrays from .npy and .npz: headers are checked against the file and a bound before memory is taken; never pickled."""

from __future__ import annotations

import bz2
import io
import math
import sys
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from steering.files.bounds import Memory

DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    UnicodeDecodeError,  # of a member's name
    zipfile.BadZipFile,
    zlib.error,
)
"""What Python's unpackers raise for a file that is cut short or damaged."""
_MOST_MEMBERS = 10_000
_AT_ONCE = 2**22


def read_npz(
    file: Path | BinaryIO, memory: Memory, wanted: Collection[str] | None = None
) -> tuple[dict[str, NDArray], list[str]]:
    """The arrays of an .npz file, only the wanted ones where given, and the names of all.

    Raises ValueError for what is too large or no plain array, and an error of DAMAGED.
    """
    with zipfile.ZipFile(file) as packed:
        members = packed.infolist()
        if len(members) > _MOST_MEMBERS:
            raise ValueError(f"found {len(members)} arrays, expected at most {_MOST_MEMBERS}")
        found = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            if wanted is None or name in wanted:
                with packed.open(member) as one:
                    found[name] = read_npy(one, memory, name, size=member.file_size)
        return found, [member.filename.removesuffix(".npy") for member in members]


def read_npy(file: IO[bytes], memory: Memory, name: str, *, size: int) -> NDArray:
    """The array in an open .npy file of so many bytes. Raises as `read_npz`."""
    shape, fortran, dtype = _header(file, name)
    if dtype.hasobject:
        raise ValueError(
            f"found Python objects in the array {name!r} (frames of changing shape, or pickled data), "
            "expected plain numbers of one shape: save the array anew, since nothing is unpickled here"
        )
    if dtype.kind not in "biufcSU" or dtype.names is not None or dtype.subdtype is not None:
        raise ValueError(f"found records of {dtype} in the array {name!r}, expected plain numbers")
    declared, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if declared != there:
        raise OSError(f"the array {name!r} declares {declared:,} bytes of values and has {max(there, 0):,}")
    out = memory.empty(shape[::-1] if fortran else shape, dtype, f"the array {name!r}")
    values: Any = out.reshape(-1).view(np.uint8) if declared else b""
    flat = memoryview(values)
    at = 0
    while at < declared:
        part = file.read(min(_AT_ONCE, declared - at))
        if not part:
            raise EOFError(f"the array {name!r} ends after {at:,} of {declared:,} bytes")
        flat[at : at + len(part)] = part
        at += len(part)
    if dtype.byteorder not in "=|" and dtype.newbyteorder("=") != dtype:
        out.byteswap(inplace=True)
    if dtype.kind == "U" and out.size and out.reshape(-1).view(np.uint32).max(initial=0) > sys.maxunicode:
        raise OSError(f"the array {name!r} has characters that there are not")
    return out.transpose() if fortran else out


def unpacked_bz2(path: Path, memory: Memory) -> BinaryIO:
    """What a .bz2 file holds, unpacked within the bound."""
    with bz2.open(path) as packed:
        content = packed.read(memory.most_bytes + 1)
    if len(content) > memory.most_bytes:
        raise ValueError(
            f"found more than {memory.most_bytes:,} bytes when unpacked, expected at most that: raise the bound "
            "(Bounds(bytes=...), --most-bytes) if the file is to be trusted"
        )
    return io.BytesIO(content)


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"version {version} of .npy")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers that Python 2 wrote
            shape, fortran, dtype = readers[version](file)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"the array {name!r} has no header of .npy: {reason}") from error
    if min(shape, default=0) < 0 or len(shape) > 32:
        raise OSError(f"the array {name!r} declares the shape {shape}")
    return shape, fortran, dtype
