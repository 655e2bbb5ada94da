"""Files that are read while they are written: one handle of each in this process, opened anew now and then.

HDF5 keeps one state for all handles of a file in a process. Part of it, such as the end of the file, is read only when
the file is opened, so that what is laid out later at its end cannot be read: the file must then be closed by everybody
and opened again.

A reader of SWMR tries a part whose checksum is wrong again 100 times, after twice as long each time, which is for ever
in a file that is damaged, or whose writer was killed, and it stops the whole process meanwhile: it is made to give up.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import h5py

_ATTEMPTS = 24
"""They take 17 ms in all."""


class SwmrFile:
    """A file that one or several threads follow. Use it while holding `turn`, and look at `generation` first: another
    one means that what was taken out of `file` before is closed."""

    turn = threading.RLock()
    _followed: ClassVar[dict[str, SwmrFile]] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: h5py.File | None = None
        self.generation = 0
        self.opened = 0.0
        """time.monotonic"""
        self._users = 0
        self._descriptor = os.open(path, os.O_RDONLY)

    @classmethod
    @contextlib.contextmanager
    def followed(cls, path: Path) -> Iterator[SwmrFile]:
        """The one handle of a file, not opened yet or as others have it."""
        with cls.turn:
            shared = cls._followed.get(str(path)) or cls(path)
            cls._followed[str(path)] = shared
            shared._users += 1
        try:
            yield shared
        finally:
            with cls.turn:
                shared._users -= 1
                if not shared._users:
                    del cls._followed[str(path)]
                    shared._close()
                    os.close(shared._descriptor)

    def open(self) -> h5py.File:
        """The open file. Raises OSError where it cannot be opened now."""
        with self.turn:
            return self.file if self.file is not None else self.reopen()

    def reopen(self) -> h5py.File:
        """Close it for all and open it again; also where it was renamed meanwhile. Raises OSError."""
        with self.turn:
            self._close()
            self.generation += 1
            self.opened = time.monotonic()
            access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
            access.set_libver_bounds(h5py.h5f.LIBVER_LATEST, h5py.h5f.LIBVER_LATEST)
            _give_up_soon(access)
            flags = h5py.h5f.ACC_RDONLY | h5py.h5f.ACC_SWMR_READ
            self.file = h5py.File(h5py.h5f.open(os.fsencode(self._name()), flags, fapl=access))
            return self.file

    def _name(self) -> str:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                return str(self.path)
        return f"/proc/self/fd/{self._descriptor}"

    def _close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(RuntimeError, OSError, ValueError):
                self.file.close()
        self.file = None


def _give_up_soon(access: h5py.h5p.PropFAID) -> None:
    """Set how often a part of a file is read again; h5py has no name for it."""
    library = _hdf5()
    if library is not None:
        library.H5Pset_metadata_read_attempts(ctypes.c_int64(access.id), ctypes.c_uint(_ATTEMPTS))


@functools.cache
def _hdf5() -> ctypes.CDLL | None:
    """The library that h5py has loaded; None where it is not found: then the source ends a receiver that is stuck."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for name in dict.fromkeys(line.partition("/")[2] for line in lines):
        if name.rpartition("/")[2].startswith("libhdf5") and "_hl" not in name:
            with contextlib.suppress(OSError):
                library = ctypes.CDLL(f"/{name}")
                if hasattr(library, "H5Pset_metadata_read_attempts"):
                    return library
    return None
