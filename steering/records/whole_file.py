"""Files that readers see as they were or as they are, never in part."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A file beside `path`, hidden, for the block to write; at its end it takes the place of what may be there.

    Where the block fails nothing is left of it, and what was there stays. Raises OSError.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file, in the place of one that may be there. durable: it is on the disk when this returns.

    Raises OSError; what was there stays then.
    """
    with draft_of(path) as draft, open(draft, "wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can say so."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
