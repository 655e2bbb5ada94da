"""Checks a scan's group of object.zarr before zarr reads it: plain numbers, packed as ours, of a bounded size."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from steering.files import own_file, read_json

_CODECS = ({"bytes"}, {"bytes", "zstd"})
_TYPES = {"bool", *(f"{sign}int{n}" for sign in ("", "u") for n in (8, 16, 32, 64)), "float16", "float32", "float64",
          "complex64", "complex128"}  # fmt: skip
_MOST_ARRAYS = 1000
_HEADER = 18
"""Bytes of the longest header of a frame of zstd."""


def check_group(group: Path, store: Path, *, most_bytes: int) -> None:
    """Raises ValueError for a group that is not one of ours, OSError. Nothing is unpacked."""
    members = sorted(entry.name for entry in os.scandir(group) if entry.name != "zarr.json")
    if len(members) > _MOST_ARRAYS:
        raise ValueError(f"found {len(members)} arrays in {group}, expected at most {_MOST_ARRAYS}")
    read_json(group / "zarr.json", root=store)
    left = most_bytes
    for name in members:
        folder = group / name
        if not (folder / "zarr.json").exists():
            raise ValueError(f"found {folder}, which is no array, expected arrays only: take it away")
        left -= _check_array(folder, read_json(folder / "zarr.json", root=store), store, left)


def _check_array(folder: Path, described: dict[str, Any], store: Path, most_bytes: int) -> int:
    shape, kind, codecs = described.get("shape"), described.get("data_type"), described.get("codecs")
    named = {c.get("name") for c in codecs if isinstance(c, dict)} if isinstance(codecs, list) else set()
    if described.get("node_type") != "array" or kind not in _TYPES or named not in _CODECS or len(codecs or ()) > 2:
        raise ValueError(
            f"found {folder} of type {kind!r:.80} with the codecs {sorted(map(str, named))[:9]}, expected plain "
            "numbers packed by bytes and zstd, as a run writes them: nothing else is read"
        )
    if described.get("storage_transformers") or not isinstance(shape, list) or len(shape) > 8:
        raise ValueError(f"found the shape {shape!r:.80} in {folder}, expected up to 8 sizes, and no transformers")
    try:
        chunk = described["chunk_grid"]["configuration"]["chunk_shape"]
        sizes = [int(n) for n in shape], [int(n) for n in chunk]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"found the metadata of {folder} damaged ({error!r}), expected those of an array") from error
    size = math.prod(sizes[0]) * np.dtype(kind).itemsize
    if min(sizes[0], default=0) < 0 or (size and sizes[0] != sizes[1]):
        raise ValueError(f"found {folder} of shape {shape} in chunks of {chunk}, expected one chunk: it is not ours")
    if size > most_bytes:
        raise ValueError(f"found {folder} of {size:,} bytes when unpacked, expected at most {most_bytes:,}")
    for place, _, files in os.walk(folder):
        for name in files:
            if name != "zarr.json":
                _check_chunk(Path(place) / name, store, size, "zstd" in named)
    return size


def _check_chunk(path: Path, store: Path, size: int, packed: bool) -> None:
    real = own_file(path, store)
    if not packed:
        found = real.stat().st_size
    else:
        with real.open("rb") as file:
            found = unpacked_size(file.read(_HEADER))
    if size and found != size:
        raise ValueError(f"found {path} that says {found:,} bytes when unpacked, expected {size:,}: it is damaged")


def unpacked_size(head: bytes) -> int:
    """Bytes that a frame of zstd says it unpacks to (RFC 8878, 3.1.1.1); -1 where it does not say."""
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return -1
    flag, single, dictionary = head[4] >> 6, head[4] >> 5 & 1, head[4] & 3
    at = 5 + (not single) + (0, 1, 2, 4)[dictionary]
    width = (single, 2, 4, 8)[flag]
    field = head[at : at + width]
    if not width or len(field) < width:
        return -1
    return int.from_bytes(field, "little") + (256 if width == 2 else 0)
