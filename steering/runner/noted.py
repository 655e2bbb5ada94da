"""A stop that no runner was there to take stands in the run's folder until one takes it.

A runner may be out of reach for a while: its job ends and the next one waits in a queue, it is lost and followed by
another one, or the workers have not come yet. Whoever gives a stop then need not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from steering.campaign import Command
from steering.files import read_json
from steering.runner.folder import RunFolder

FILE = "stop.json"
_LOOK_S = 1.0


def note_stop(folder: RunFolder, by: str) -> None:
    """Leave a stop for the run's next runner. by: who gives it, user@host. Raises OSError."""
    folder.write_file(FILE, json.dumps({"by": by, "time": time.time()}).encode())


def noted_stop(folder: RunFolder) -> Command | None:
    """The stop that stands in the folder; None where there is none, or nobody knows because the folder is out of reach.
    What is there and cannot be read is a stop all the same."""
    path = folder.path / FILE
    try:
        noted = read_json(path)
        return Command(time=float(noted["time"]), name="stop", by=str(noted["by"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return Command(time=time.time(), name="stop", by=f"{FILE} of the run's folder") if _there(path) else None


def _there(path: Path) -> bool:
    try:
        os.lstat(path)  # a disk that is cut off says of nothing that it is there
    except OSError:
        return False
    return True


async def take_noted(folder: RunFolder, take: Callable[[Command], None]) -> None:
    """Take a stop whenever one is noted, for ever."""
    while True:
        stop = await asyncio.to_thread(noted_stop, folder)
        if stop is not None:
            take(stop)
            with contextlib.suppress(OSError):  # taken twice it changes nothing more
                (folder.path / FILE).unlink(missing_ok=True)
        await asyncio.sleep(_LOOK_S)
