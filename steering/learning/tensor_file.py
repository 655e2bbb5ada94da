"""Named tensors in one file, written piece by piece and read row by row: safetensors, so that other tools can read it.

A reader believes nothing that the file says of itself: names, dtypes, shapes and places are checked against the size of
the file before anything is allocated, links are not followed, and nothing is executed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.learning.rows import host_rows
from steering.records.whole_file import sync_folder

FORMAT = 1
"""Of all files that hold a part of a checkpoint, and of memories. A reader refuses any other."""
_KEY = "steering"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 4 * 2**20
_MOST_TENSORS = 20_000
_MOST_AXES = 8
_MOST_NUMBERS = 2**27
"""Of a column that is read whole; a buffer of 16 GiB has some 2**22 rows."""


@dataclass(frozen=True)
class Place:
    """A tensor of a file: its dtype and shape, and where it begins."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def width(self) -> int:
        """Bytes of a row, along the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes one file, whole or not at all: it has its name only after `finish`.

    Args:
        path: replaced by `finish` where it is there.
        tensors: dtype and shape of each.
        scalars: JSON beside them; `kind` says what the file holds.

    Raises OSError, ValueError for more names than a reader takes.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], scalars: Mapping[str, Any]
    ) -> None:
        self.path, self.nbytes = path, 0
        self._draft = path.with_name(path.name + ".part")
        header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps({"format": FORMAT, **scalars})}}
        self.places: dict[str, Place] = {}
        for name, (dtype, shape) in tensors.items():
            if dtype not in _NAMES:
                raise ValueError(f"found {name!r} of {dtype}, expected one of {', '.join(map(str, _NAMES))} in a file")
            place = self.places[name] = Place(dtype, tuple(shape), self.nbytes)
            self.nbytes += place.nbytes
            offsets = [place.start, self.nbytes]
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > _MOST_HEADER or len(tensors) > _MOST_TENSORS:
            raise ValueError(
                f"found {len(text):,} bytes of names for {len(tensors):,} tensors in {path}, expected at most "
                f"{_MOST_HEADER:,} for {_MOST_TENSORS:,}: nobody could read it"
            )
        self._data = 8 + len(text)
        self.nbytes += self._data
        self._file = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            self._put(0, len(text).to_bytes(8, "little") + text)
        except OSError:
            self.abandon()
            raise

    def write(self, name: str, rows: Any, start: int = 0) -> None:
        """Write rows start, start + 1, ... of a tensor: bytes-like, C-contiguous. Large ones let other threads run."""
        place = self.places[name]
        self._put(self._data + place.start + start * place.width, rows)

    def write_tensor(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Write a tensor (n, ...) on the CPU as rows start, start + 1, ...; one without axes whole."""
        if tensor.numel():
            self.write(name, host_rows(tensor.contiguous().reshape(-1) if tensor.ndim == 0 else tensor), start)

    def finish(self) -> int:
        """Wait until all is on the disk, and give the file its name; returns its bytes. Raises OSError."""
        os.ftruncate(self._file, self.nbytes)
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        os.replace(self._draft, self.path)
        sync_folder(self.path.parent)
        return self.nbytes

    def abandon(self) -> None:
        """Leave nothing behind. Harmless after `finish`."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            with contextlib.suppress(OSError):
                self._draft.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def _put(self, offset: int, data: Any) -> None:
        left = memoryview(data).cast("B")
        while len(left):
            count = os.pwrite(self._file, left, offset)
            left, offset = left[count:], offset + count


class TensorFile:
    """A file of tensors, open for reading; close it, or use it as a context manager.

    Args:
        path: a regular file, not a link.
        kind: what it must hold, as given to the writer.

    Raises:
        OSError: it cannot be read. ValueError: it is damaged, of another kind or of another version.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise FileNotFoundError(f"found no {path}, expected it: the checkpoint or memory is not complete") from None
        try:
            self.scalars, self.places = self._header()
            if self.scalars.get("format") != FORMAT:
                raise ValueError(
                    f"found {path} in format {str(self.scalars.get('format'))[:20]!r}, expected {FORMAT}: read it with "
                    "the version of steering that wrote it"
                )
            if self.scalars.get("kind") != kind:
                raise ValueError(f"found {path} with {str(self.scalars.get('kind'))[:50]!r}, expected {kind!r}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def place(self, name: str, dtype: torch.dtype | None = None, rows: int | None = None) -> Place:
        """Where a tensor is. Raises ValueError where it is missing, or not of this dtype or number of rows."""
        found = self.places.get(name)
        if found is None:
            raise ValueError(f"found no {name!r} in {self.path}, expected it: the file is damaged or not complete")
        if (dtype is not None and found.dtype != dtype) or (rows is not None and found.shape[:1] != (rows,)):
            raise ValueError(
                f"found {name!r} of {found.dtype} {found.shape} in {self.path}, expected "
                f"{dtype or 'any dtype'} and {'any number of' if rows is None else rows} rows: the file is damaged"
            )
        return found

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        place = self.place(name)
        found = torch.empty(place.shape, dtype=place.dtype)
        if found.numel():
            self._read(place.start, host_rows(found.view(-1)))
        return found

    def numbers(self, name: str, shape: tuple[int | None, ...]) -> NDArray[np.int64]:
        """A whole tensor of int64 with these sizes, None for any. Raises ValueError where it has others."""
        place = self.place(name, torch.int64)
        sizes = zip(place.shape, shape, strict=False)
        if len(place.shape) != len(shape) or any(want not in (None, size) for size, want in sizes):
            raise ValueError(f"found {name!r} of shape {place.shape} in {self.path}, expected {shape}")
        if math.prod(place.shape) > _MOST_NUMBERS:  # a file of any size may take no room on its disk
            raise ValueError(
                f"found {name!r} of shape {place.shape} in {self.path}, expected {_MOST_NUMBERS:,} numbers at most"
            )
        return self.tensor(name).numpy()

    def rows(self, name: str, index: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Read rows of a tensor into `out`, uint8 (n, bytes of a row); neighbours that follow each other at once."""
        place = self.place(name)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < place.shape[0]:
            raise ValueError(f"found rows outside {name!r} of {self.path}, expected 0 to {place.shape[0] - 1}")
        cuts = np.flatnonzero(np.diff(index) != 1) + 1
        for first, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(index)], strict=True):
            if end > first:
                self._read(place.start + int(index[first]) * place.width, out[first:end])

    def content(self) -> Iterator[bytes]:
        """The whole file as it was when it was opened, in blocks. Raises ValueError where it was cut short since."""
        at = 0
        while at < self.size:
            block = os.pread(self._file, min(2**20, self.size - at), at)
            if not block:
                raise ValueError(f"found {self.path} cut short while it was read, expected {self.size - at} bytes more")
            at += len(block)
            yield block

    def _read(self, start: int, out: NDArray[np.uint8]) -> None:
        left, offset = memoryview(out.data).cast("B"), self._data + start
        while len(left):
            count = os.preadv(self._file, [left], offset)
            if not count:
                raise ValueError(f"found {self.path} cut short while it was read, expected {len(left)} bytes more")
            left, offset = left[count:], offset + count

    def _header(self) -> tuple[dict[str, Any], dict[str, Place]]:
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"found no regular file at {self.path}, expected a file of tensors")
        self.size = found.st_size
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if not 2 <= length <= min(_MOST_HEADER, found.st_size - 8):
            raise ValueError(f"found {self.path} without a header of safetensors: it is damaged or of another format")
        self._data = 8 + length
        try:
            header = json.loads(os.pread(self._file, length, 8))
            scalars = json.loads(header.pop("__metadata__")[_KEY])
            if not isinstance(scalars, dict) or len(header) > _MOST_TENSORS:
                raise TypeError("no mapping of scalars, or too many tensors")
            places = {str(name): _place(entry, found.st_size - self._data) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"found {self.path} with a header that is damaged or not ours ({type(error).__name__}: "
                f"{str(error)[:100]}), expected a file that steering wrote"
            ) from None
        return scalars, places


def inside(folder: Path, name: str) -> Path:
    """A file below a folder, which no link leads out of. Raises ValueError where one does."""
    path = folder / name
    if path.parent.resolve() != folder.resolve() / Path(name).parent:
        raise ValueError(f"found a link at {path.parent} that leads elsewhere, expected a folder of its own")
    return path


def _place(entry: Mapping[str, Any], size: int) -> Place:
    """A tensor's place, from its entry in the header; `size` are the bytes that the file has for all."""
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > _MOST_AXES or any(type(n) is not int or not 0 <= n < 2**48 for n in (*shape, start, end)):
        raise ValueError(f"shape {str(shape)[:50]} at {str(start)[:20]}")
    place = Place(_DTYPES[entry["dtype"]], shape, start)
    if end > size or end - start != place.nbytes:
        raise ValueError(f"a tensor of {place.nbytes} bytes from {start} to {end} in {size} bytes")
    return place
