"""Files that are read while they are written: one handle of each in this process, opened anew now and then.

HDF5 keeps one state for all handles of a file in a process. Part of it, such as the end of the file, is read only when
the file is opened, so that what is laid out later at its end cannot be read: the file must then be closed by everybody
and opened again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import h5py


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
            self.file = h5py.File(self._name(), "r", libver="latest", swmr=True)
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
