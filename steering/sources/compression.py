"""Decompresses single frames that detectors send compressed: the codecs' HDF5 framing, through HDF5's own filters.

One in-memory dataset per shape, dtype and codec is reused: a frame's payload is written into it as a chunk and read
back. That is several times faster than a new file for each frame, and needs no library beside h5py and hdf5plugin.
"""

from __future__ import annotations

import itertools
import struct
import threading

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from steering.sources.streams import Packed

LARGEST = 2**30
"""Bytes of a frame, at most: a torn size must not cost memory."""
ALGORITHMS = ("bslz4", "lz4", "blosc")

_names = itertools.count()


class Decompressor:
    """Decompresses frames, in any thread. It keeps the dataset of the newest few kinds of frames."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._kept: dict[tuple[str, tuple[int, ...], str], h5py.Dataset] = {}

    def __call__(self, algorithm: str, payload: bytes, shape: tuple[int, int], dtype: np.dtype) -> NDArray:
        """A frame (y, x) out of its payload: `bslz4` and `lz4` begin with the size in 8 bytes and the block in 4, both
        big-endian; `blosc` is one blosc buffer. Raises ValueError for what is no such payload."""
        refuse_other(algorithm, payload, shape, dtype)
        out = np.empty(shape, dtype)
        with self._turn:
            dataset = self._dataset(algorithm, shape, dtype)
            try:
                dataset.id.write_direct_chunk((0, 0), payload)
                dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, out)
            except (OSError, RuntimeError, ValueError) as error:
                self._kept.clear()  # a chunk that cannot be read would stay in the dataset
                raise ValueError(f"found a damaged payload of {len(payload)} bytes ({algorithm}): {error}") from error
        return out

    def later(self, algorithm: str, payload: bytes, shape: tuple[int, int], dtype: np.dtype) -> Packed:
        """The frame, decompressed where it is looked at. Raises ValueError for what can be seen to be none by now."""
        refuse_other(algorithm, payload, shape, dtype)
        return Packed(shape, dtype, lambda: self(algorithm, payload, shape, dtype))

    def _dataset(self, algorithm: str, shape: tuple[int, int], dtype: np.dtype) -> h5py.Dataset:
        key = algorithm, shape, dtype.str
        if key not in self._kept:
            if len(self._kept) >= 8:
                self._kept.clear()
            filters = {
                "bslz4": lambda: hdf5plugin.Bitshuffle(cname="lz4"),
                "lz4": hdf5plugin.LZ4,
                "blosc": hdf5plugin.Blosc,
            }
            file = h5py.File(f"frame-{next(_names)}", "w", driver="core", backing_store=False, rdcc_nbytes=0)
            self._kept[key] = file.create_dataset("frame", shape, dtype, chunks=shape, **filters[algorithm]())
        return self._kept[key]


def compress(algorithm: str, frame: NDArray) -> bytes:
    """The payload of a frame (y, x) in one of ALGORITHMS, for servers and tests."""
    filters = {"bslz4": hdf5plugin.Bitshuffle(cname="lz4"), "lz4": hdf5plugin.LZ4(), "blosc": hdf5plugin.Blosc()}
    with h5py.File(f"frame-{next(_names)}", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("frame", data=frame, chunks=frame.shape, **filters[algorithm])
        return dataset.id.read_direct_chunk((0, 0))[1]


def refuse_other(algorithm: str, payload: bytes, shape: tuple[int, int], dtype: np.dtype) -> None:
    """Raises ValueError for a payload whose first bytes do not say that it is a frame of this shape."""
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if algorithm not in ALGORITHMS:
        raise ValueError(f"found the codec {algorithm!r}, expected one of {', '.join(ALGORITHMS)}")
    if not 0 < size <= LARGEST:
        raise ValueError(f"found a frame of {shape} {dtype}, expected 1 to {LARGEST} bytes")
    if algorithm == "blosc":
        _refuse_other_blosc(payload, size)
    else:
        _refuse_other_size(payload, size)


def _refuse_other_size(payload: bytes, size: int) -> None:
    if len(payload) < 12:
        raise ValueError(f"found a payload of {len(payload)} bytes, expected its size (8), its block (4) and the data")
    stated, block = struct.unpack(">QI", payload[:12])
    if stated != size or not 0 < block <= LARGEST:
        raise ValueError(f"found a payload of {stated} bytes in blocks of {block}, expected {size} bytes")


def _refuse_other_blosc(payload: bytes, size: int) -> None:
    stated = struct.unpack("<I", payload[4:8])[0] if len(payload) >= 16 else 0
    if stated != size:
        raise ValueError(f"found a blosc buffer of {stated} bytes, expected {size}")
