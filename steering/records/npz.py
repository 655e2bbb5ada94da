"""Arrays in a file: an .npz that is not compressed and holds no object, so that reading it runs no code."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steering.records.whole_file import draft_of


def write_arrays(path: Path, arrays: Mapping[str, NDArray]) -> int:
    """Write arrays of numbers as a file that is whole and on disk when this returns, or not there. Returns its bytes.

    Raises OSError.
    """
    with draft_of(path) as draft, open(draft, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def read_arrays(path: Path) -> dict[str, NDArray]:
    """The arrays of such a file, never larger in memory than the file is on disk.

    Raises OSError where it cannot be read, ValueError for a file of another kind.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("no regular file")
            size = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as packed:
                members = packed.infolist()
                if (
                    any(m.compress_type != zipfile.ZIP_STORED for m in members)
                    or sum(m.file_size for m in members) > size
                ):
                    raise ValueError("compressed arrays")
                return {m.filename.removesuffix(".npy"): _array(packed.read(m)) for m in members}
    except (ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: found {error}, expected arrays as steering writes them") from error


def _array(content: bytes) -> NDArray:
    """From the bytes of an .npy file of version 1; its array is a copy, and can be written to."""
    if content[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("an array of another format")
    file = io.BytesIO(content[8:])
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "biufc" or fortran:
        raise ValueError(f"an array of {dtype}")
    values = np.frombuffer(content, dtype, offset=8 + file.tell())
    return values.reshape(shape).copy()
