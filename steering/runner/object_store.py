"""object.zarr: what a run leaves of each scan, as a group that is replaced whole.

The metadata of all groups stand in the root's, and those of a group in the group's own (zarr calls it consolidated), so
that `xarray.open_datatree(path)` and `open_zarr(path, group=...)` read one file first and warn of nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

import xarray as xr

from steering.records.whole_file import write_whole
from steering.runner.object_check import check_group

_EXCHANGE = 2
"""RENAME_EXCHANGE of Linux's renameat2."""
_MOST_BYTES = 2**34
"""Of a scan's image and table when unpacked."""
_HERE = -100
"""AT_FDCWD: paths as they are."""


def write_scan(store: Path, scan: str, image: xr.Dataset) -> None:
    """Write a scan's group in place of an earlier one. Raises OSError, and what xarray raises.

    A reader that opens it sees the old group or the new. Each variable is one chunk, one file: one that was opened
    before and is read after gives the old values or the new, or ValueError where the number of frames has changed.
    """
    fresh, old = store.parent / f".new-{scan}", store.parent / f".old-{scan}"
    store.mkdir(exist_ok=True)
    try:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        whole = {name: {"chunks": value.shape} for name, value in image.variables.items() if value.ndim and value.size}
        image.to_zarr(fresh, mode="w", consolidated=False, zarr_format=3, encoding=whole)
        members = {path.parent.name: json.loads(path.read_text()) for path in sorted(fresh.glob("*/zarr.json"))}
        group = json.loads((fresh / "zarr.json").read_text())
        _write_group(fresh, group, members)
        _put(fresh, store / scan, old)
        _write_root(store, scan, group, members)
    finally:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)


def read_scan(store: Path, scan: str, *, most_bytes: int = _MOST_BYTES) -> xr.Dataset:
    """A scan's group, loaded: all of it old or all of it new, where it is replaced meanwhile.

    Raises OSError, and ValueError for a group that is damaged, larger than the bound when unpacked, has links out of
    the store, or is packed in other ways than ours: no codec that unpickles is ever asked.
    """
    while True:
        before = (store / scan).stat()
        try:
            check_group(store / scan, store, most_bytes=most_bytes)
            with xr.open_dataset(store / scan, engine="zarr", consolidated=False, chunks=None) as image:
                loaded = image.load()
        except Exception as error:  # what zarr and xarray raise for damaged metadata is of many kinds
            if not _same(before, store / scan):
                continue
            if isinstance(error, OSError):
                raise
            raise ValueError(
                f"found {store / scan} damaged ({error}), expected a scan's group as a run writes it: copy it again"
            ) from error
        if _same(before, store / scan):
            return loaded


def scans_in(store: Path) -> list[str]:
    """Names of the groups."""
    return sorted(group.parent.name for group in store.glob("*/zarr.json"))


def _same(before: os.stat_result, path: Path) -> bool:
    now = path.stat()
    return (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def _write_root(store: Path, scan: str, group: dict[str, Any], members: dict[str, Any]) -> None:
    root = store / "zarr.json"
    known = json.loads(root.read_text()) if root.exists() else {}
    known.setdefault("attributes", {})
    others = known.get("consolidated_metadata", {}).get("metadata", {})
    kept = {name: value for name, value in others.items() if name.split("/")[0] != scan}
    own = {scan: group | _consolidated({})} | {f"{scan}/{name}": value for name, value in members.items()}
    _write_group(store, {"attributes": {}, "zarr_format": 3, "node_type": "group"} | known, kept | own)


def _write_group(folder: Path, group: dict[str, Any], members: dict[str, Any]) -> None:
    write_whole(folder / "zarr.json", json.dumps(group | _consolidated(members)).encode())


def _consolidated(members: dict[str, Any]) -> dict[str, Any]:
    return {"consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": members}}


def _put(fresh: Path, final: Path, old: Path) -> None:
    """Put a folder in the place of another one, at once where the system can; what was there may be left in `fresh`."""
    if not final.exists():
        os.replace(fresh, final)
    elif not _exchanged(fresh, final):  # some network file systems cannot: for a moment there is neither
        os.replace(final, old)
        os.replace(fresh, final)


def _exchanged(one: Path, other: Path) -> bool:
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    if exchange is None:
        return False
    return not exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
