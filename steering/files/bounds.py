"""Bounds on what reading a file may cost, and the small readers that keep them: whole files and JSON."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_JSON_BYTES = 2**26
_KINDS = "biufcSU"
"""Kinds of dtype that hold plain values: neither Python objects nor records."""


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What reading one scan may cost, and where it may read."""

    bytes: int = field(default_factory=_half_of_memory)
    """Most bytes of all arrays as they are in memory (half of the machine's). The process that reads them has at most
    as much again to work in, and 256 MiB."""
    seconds: float = 600.0
    """Longest time of reading."""
    folders: tuple[str, ...] = ()
    """Where a file may link to, beside its own folder and what is below that: HDF5 links, virtual sources and external
    storage."""

    def __post_init__(self) -> None:
        if self.bytes < 1 or not self.seconds > 0:
            raise ValueError(f"found bounds of {self.bytes} bytes and {self.seconds} s, expected both above 0")


class Memory:
    """Memory for what is read from a file: at most so many bytes in all."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.used = 0

    def empty(self, shape: Sequence[int], dtype: DTypeLike, what: str) -> NDArray:
        """An array to read into. Raises ValueError for one too large, and for dtypes that are no plain values."""
        dtype = np.dtype(dtype).newbyteorder("=")
        if dtype.kind not in _KINDS or dtype.names is not None or dtype.subdtype is not None:
            raise ValueError(
                f"found {what} of {dtype} (Python objects or records), expected plain numbers of one shape"
            )
        shape = tuple(int(n) for n in shape)
        size = math.prod(shape) * dtype.itemsize
        if size > self.most_bytes - self.used:
            before = f" beside {self.used:,} of others" if self.used else ""
            raise ValueError(
                f"found {what} of shape {shape}, {dtype}: {size:,} bytes{before}, expected at most {self.most_bytes:,} "
                "in all: raise the bound (Bounds(bytes=...), --most-bytes) if the file is to be trusted"
            )
        self.used += size
        return self._allocate(shape, dtype, size)

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype, size: int) -> NDArray:
        return np.empty(shape, dtype)


def own_file(path: Path, root: Path) -> Path:
    """The path of a regular file in the folder `root`, links resolved.

    Raises FileNotFoundError where it is not there, ValueError where a link leads out of the folder or it is no file: a
    folder from a stranger must not make a reader open another file, or wait for a pipe.
    """
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise ValueError(f"found {path}, a link to {real}, expected a file inside {root}: put the file itself there")
    if not stat.S_ISREG(real.stat().st_mode):
        raise ValueError(f"found {path}, which is no regular file, expected one: take it away")
    return real


def read_bytes(path: Path, *, most_bytes: int = _JSON_BYTES, root: Path | None = None) -> bytes:
    """A whole file, which must be inside `root` (its own folder). Raises ValueError for one larger than the bound."""
    real = own_file(path, path.parent if root is None else root)
    with real.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(
            f"found {path} of more than {most_bytes:,} bytes, expected at most that: it is not one of ours"
        )
    return content


def read_json(path: Path, *, most_bytes: int = _JSON_BYTES, root: Path | None = None) -> dict[str, Any]:
    """A JSON object from a file inside `root` (its own folder). Raises ValueError for anything else, OSError."""
    content = read_bytes(path, most_bytes=most_bytes, root=root)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"found {path} that is no JSON ({error}), expected a JSON object: it is damaged; copy it again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"found a {type(found).__name__} in {path}, expected a JSON object")
    return found
