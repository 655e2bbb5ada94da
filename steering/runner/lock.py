"""Who holds a run: a lock in its folder that is gone with the process that took it, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from steering.files import read_json
from steering.runner.folder import RunFolder

DRIVER, RUNNER = "driver", "runner"
"""The process that runs the workflow, and the worker with the campaign: where a cluster outlives its driver, the latter
goes on alone."""
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
"""The file is written: a link in a folder from a stranger must not lead to another one."""


@contextlib.contextmanager
def held(folder: RunFolder, who: str) -> Iterator[None]:
    """Hold a run. Raises RuntimeError where another process does so."""
    descriptor = os.open(_file(folder, who), _OPEN | os.O_CREAT, 0o644)
    try:
        if not _taken(descriptor):
            raise RuntimeError(_refusal(folder, who))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def wait_until_free(folder: RunFolder, who: str, seconds: float = 60.0) -> None:
    """Wait for a process that holds the run to end, so long at most: one that is cut off from its cluster ends itself
    when it notices."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(RuntimeError), held(folder, who):
            return
        time.sleep(0.1)


def refuse_held(folder: RunFolder) -> None:
    """Raise RuntimeError where a process holds the run."""
    for who in (DRIVER, RUNNER):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(_file(folder, who), _OPEN)
            try:
                if not _taken(descriptor):
                    raise RuntimeError(_refusal(folder, who))
            finally:
                os.close(descriptor)


def _file(folder: RunFolder, who: str) -> Path:
    return folder.path / f".{who}.lock"


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refusal(folder: RunFolder, who: str) -> str:
    holder = "another process"
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = read_json(_file(folder, who))
        holder = f"process {found['pid']} on {found['host']}"
    return (
        f"{folder.name}: found a run that is alive (its {who} is {holder}), expected one whose processes are gone: "
        "follow it with `steering status`, end it with `steering stop`"
    )
