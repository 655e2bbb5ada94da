"""Reads foreign files in a process of its own, with limits on memory and time, which a crash may end.

The library that reads HDF5 is C code with known holes in its memory handling (h5py 3.16 brings HDF5 2.0.0), so that a
file may crash the process that reads it, or take more memory than Python can see. A small server process is started for
the first file; it imports numpy and h5py and nothing of a stranger's, and forks for each file: the fork sets its
limits, reads, and writes plain arrays into shared memory, which this process maps without a copy. The server ends by
itself ten seconds after the last file, and with this process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.files.bounds import Bounds

_ROOT = str(Path(__file__).parents[2])
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from steering.files.child import serve; serve(int(sys.argv[2]))"
)
_ARRAY_READER = "steering.files.array_file:read_array_file"
_SPARE_S = 30.0
"""A fork ends itself when its time is over; after so much more the server is given up."""
_MOST_REPLY = 2**26
_KINDS = {"ValueError": ValueError, "OSError": OSError, "FileNotFoundError": FileNotFoundError}


class _Gone(Exception):
    """The server has ended, before it took the request up."""


class _Server:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self.channel, theirs = socket.socketpair()
        # Its own threads are in nobody's way, and a fork takes none of them along.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, _ROOT, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # libraries of filters print there
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    def ask(self, request: dict[str, Any], memory: int, seconds: float) -> dict[str, Any]:
        try:
            line = json.dumps(request).encode()
            self.channel.settimeout(None)
            socket.send_fds(self.channel, [len(line).to_bytes(4, "little")], [memory])
            self.channel.sendall(line)
            self.channel.settimeout(seconds + _SPARE_S)
            size = int.from_bytes(self._receive(4), "little")
            if size > _MOST_REPLY:
                raise OSError(f"found a description of {size:,} bytes, expected at most {_MOST_REPLY:,}")
            reply: dict[str, Any] = json.loads(self._receive(size))
        except TimeoutError as error:
            raise OSError(f"found no answer within {seconds:.0f} s, expected the file read by then") from error
        return reply

    def _receive(self, size: int) -> bytes:
        parts = b""
        while len(parts) < size:
            try:
                part = self.channel.recv(min(size - len(parts), 2**20))
            except ConnectionResetError:
                part = b""
            if not part:
                raise _Gone
            parts += part
        return parts

    def close(self) -> None:
        self.channel.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


_lock = threading.Lock()
_server: _Server | None = None


def isolated(reader: str, path: str | Path, bounds: Bounds | None = None, **options: Any) -> dict[str, Any]:
    """Call a reader, "module:function" with (path, memory, bounds, **options), in a process with limits.

    options: what JSON can hold. Returns what it returns: a dictionary of JSON values and, at its top level, arrays.
    Raises ValueError and OSError as the reader does, and OSError where the file crashed the process, or took more
    memory or time than the bounds allow.
    """
    bounds = bounds or Bounds()
    limits = {"bytes": bounds.bytes, "seconds": bounds.seconds, "folders": list(bounds.folders)}
    request = {"reader": reader, "path": str(Path(path).absolute()), "bounds": limits, "options": options}
    memory = os.memfd_create("scan") if hasattr(os, "memfd_create") else _unnamed_file()
    try:
        reply = _asked(request, memory, bounds.seconds)
        if "error" in reply:
            kind, message = reply["error"]
            raise _KINDS.get(kind, OSError)(message)
        return _with_arrays(reply["found"], reply["arrays"], memory)
    finally:
        os.close(memory)


def isolated_array(path: str | Path, names: Sequence[str], bounds: Bounds | None = None) -> NDArray:
    """One array of a .npy, .npz, .mat or HDF5 file: the first of `names` that is there, or the only one; of FILE:/path
    the one that is named. Axes are those of whoever wrote it: MATLAB's (y, x, mode) stay so.

    Raises ValueError and OSError, with the path in front, for a file that is damaged, or has no such array.
    """
    file, colon, inside = str(path).rpartition(":")
    named = bool(colon) and not Path(path).is_file()
    options = {"names": [inside.strip("/")] if named else list(names), "named": named}
    try:
        found: NDArray = isolated(_ARRAY_READER, file if named else path, bounds, **options)["array"]
    except (ValueError, OSError) as error:
        raise type(error)(f"{path}: {error}") from error
    return found


def _asked(request: dict[str, Any], memory: int, seconds: float) -> dict[str, Any]:
    global _server
    with _lock:
        for again in (True, False):
            if _server is not None and _server.pid != os.getpid():
                _server = None  # this process is a fork: the server belongs to its parent
            if _server is None:
                _server = _Server()
            try:
                return _server.ask(request, memory, seconds)
            except (_Gone, BrokenPipeError) as error:  # it had ended in the meantime
                _close()
                if not again:
                    raise OSError("found that the process that reads files cannot be started") from error
            except BaseException:
                _close()
                raise
    raise AssertionError


@atexit.register
def _close() -> None:
    global _server
    if _server is not None and _server.pid == os.getpid():
        _server.close()
    _server = None


def _unnamed_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _with_arrays(found: dict[str, Any], arrays: dict[str, Any], memory: int) -> dict[str, Any]:
    size = os.fstat(memory).st_size
    shared = mmap.mmap(memory, size) if size else None
    for name, (offset, code, shape) in arrays.items():
        dtype, count = np.dtype(str(code)), math.prod(shape)
        if shared is None or not count:
            found[name] = np.empty(shape, dtype)
        else:
            found[name] = np.frombuffer(shared, dtype, count, offset).reshape(shape)
    return found
