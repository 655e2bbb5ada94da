"""The process that reads foreign files: a server that forks for each, see `isolated`."""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import resource
import signal
import socket
import traceback
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from steering.files.bounds import Bounds, Memory

_IDLE_S = 10.0
_PRELOADED = ("steering.files.scan", "steering.files.array_file")
_WORK_BYTES = 2**28


class SharedMemory(Memory):
    """Memory in a file without a name that the asking process maps too."""

    def __init__(self, most_bytes: int, file: int) -> None:
        super().__init__(most_bytes)
        self._file = file
        self._end = 0
        self.given: list[tuple[int, int, NDArray]] = []
        """(address, offset, array)"""

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype, size: int) -> NDArray:
        if not size:
            return np.empty(shape, dtype)
        offset, self._end = self._end, self._end + -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self._file, self._end)
        array = np.frombuffer(mmap.mmap(self._file, size, offset=offset), dtype).reshape(shape)
        self.given.append((array.ctypes.data, offset, array))
        return array

    def offset(self, array: NDArray) -> int | None:
        """Where in the file the values of an array are; None for one that is elsewhere."""
        if not array.flags.c_contiguous:
            return None
        for address, offset, whole in self.given:
            if address <= array.ctypes.data and array.ctypes.data + array.nbytes <= address + whole.nbytes:
                return offset + array.ctypes.data - address
        return None

    def shared(self, array: NDArray, what: str) -> int:
        """The same, copied there where it must be."""
        offset = self.offset(array)
        if offset is None:
            copy = self.empty(array.shape, array.dtype, what)
            copy[...] = array
            offset = self.offset(copy) or 0
        return offset


def serve(descriptor: int) -> None:
    """Answer requests on a socket, each by a fork, until nobody asks any more."""
    channel = socket.socket(fileno=descriptor)
    for name in _PRELOADED:  # once, for all forks
        importlib.import_module(name)

    while True:
        channel.settimeout(_IDLE_S)
        try:
            head, files, _, _ = socket.recv_fds(channel, 4, 1)
        except TimeoutError:
            return
        if len(head) < 4:
            return
        channel.settimeout(None)
        request = json.loads(channel.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL))
        child = os.fork()
        if not child:
            _answer(channel, request, files[0])
        os.close(files[0])
        _, status = os.waitpid(child, 0)
        if status:
            _send(channel, {"error": ["OSError", _death(status, request)]})


def _death(status: int, request: dict[str, Any]) -> str:
    bounds = request["bounds"]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU):
        return (
            f"found a file that was not read within {bounds['seconds']:.0f} s, expected less: raise the bound "
            "(Bounds(seconds=...)) if it is to be trusted"
        )
    how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    return (
        f"found a file that ended the process that read it ({how}): it is damaged, or made to harm; expected a whole "
        "one: copy it again"
    )


def _answer(channel: socket.socket, request: dict[str, Any], file: int) -> NoReturn:
    """Read what is asked for, in the fork, and end."""
    code = 1
    try:
        bounds = Bounds(**request["bounds"] | {"folders": tuple(request["bounds"]["folders"])})
        memory = SharedMemory(bounds.bytes, file)
        _limit(bounds)
        _send(channel, _read(request, memory, bounds))
        code = 0
    finally:
        os._exit(code)


def _limit(bounds: Bounds) -> None:
    signal.setitimer(signal.ITIMER_REAL, bounds.seconds)
    limits = {
        resource.RLIMIT_AS: _size() + 2 * bounds.bytes + _WORK_BYTES,
        resource.RLIMIT_FSIZE: bounds.bytes + _WORK_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        most = resource.getrlimit(which)[1]
        least = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(which, (least, least))


def _size() -> int:
    """Bytes of address space that this process has by now."""
    with contextlib.suppress(FileNotFoundError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
    return 2**30  # not Linux


def _read(request: dict[str, Any], memory: SharedMemory, bounds: Bounds) -> dict[str, Any]:
    module, name = request["reader"].split(":")
    try:
        found = getattr(importlib.import_module(module), name)(request["path"], memory, bounds, **request["options"])
        arrays = {key: value for key, value in found.items() if isinstance(value, np.ndarray)}
        places = {key: [memory.shared(a, key), a.dtype.str, list(a.shape)] for key, a in arrays.items()}
        return {"found": {k: v for k, v in found.items() if k not in arrays}, "arrays": places}
    except MemoryError:
        more = (
            f"found a file that needs more memory than {bounds.bytes:,} bytes, expected at most that: raise the bound"
        )
        return {"error": ["OSError", f"{more} (Bounds(bytes=...), --most-bytes) if the file is to be trusted"]}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        by_library = where.filename.endswith(".pyx")  # HDF5 says what it finds by errors of many types
        if isinstance(error, OSError) or (isinstance(error, ValueError) and not by_library):
            kind = next(k.__name__ for k in (FileNotFoundError, OSError, ValueError) if isinstance(error, k))
            return {"error": [kind, _line(error)]}
        reason = _line(error)
        if not by_library:
            reason += f" ({type(error).__name__}, {where.name} in {os.path.basename(where.filename)})"
        return {"error": ["OSError", f"found a damaged file ({reason}), expected a whole one: copy it again"]}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:4000]


def _send(channel: socket.socket, reply: dict[str, Any]) -> None:
    line = json.dumps(reply).encode("utf-8", "replace")
    channel.sendall(len(line).to_bytes(4, "little") + line)
