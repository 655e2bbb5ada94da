"""The folder that a run leaves: figures, events, live objects, models. Every file is written whole or not at all; the
log of events grows by whole lines."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import xarray as xr

from steering.files import own_file, read_json
from steering.records import scan_name
from steering.records.whole_file import write_whole
from steering.runner.object_store import read_scan, scans_in, write_scan

logger = logging.getLogger(__name__)

BALLAST_BYTES = 65536
_MOST_EVENTS, _MOST_LINE = 2**34, 2**26
"""Bytes of events.jsonl, and of one event."""
PUBLISHED_FOLDER = "steering-run"
"""The key of a scheduler's metadata under which the folder of its newest run stands."""
ENDINGS = ("finished", "failed", "interrupted")


class RunFolder:
    """A run's folder, open for reading and writing. Holds nothing but its path, so it travels between processes.

    One process at a time may write the summary; events may be appended by several.
    """

    def __init__(self, path: str | Path, *, recovering: bool = False) -> None:
        """Open the folder of an existing run. recovering: a run that is started with it goes on from its newest
        checkpoint. Raises FileNotFoundError where there is none."""
        self.path = Path(path).absolute()
        self.recovering = recovering
        if not (self.path / "summary.json").is_file():
            found = "no summary.json in it" if self.path.is_dir() else "no such folder"
            raise FileNotFoundError(
                f"{self.path}: found {found}, expected the folder of a run (steering run --out names it)"
            )

    @classmethod
    def create(
        cls, path: str | Path, workflow: Path | None = None, *, start: Mapping[str, Any] | None = None
    ) -> RunFolder:
        """Make the folder of a new run and prove that it can be written; `workflow` is copied into it as workflow.py.

        start: what the method of this name returns later.

        Raises OSError where that is not possible; what was begun is taken away again.
        """
        path = Path(path).absolute()
        with explained(path):
            made = [folder for folder in (path, *path.parents) if not folder.exists()]
            _claim(path, made)
            try:
                # Real bytes, kept until the end: on a full disk they make room for the run's last words.
                (path / ".ballast").write_bytes(os.urandom(BALLAST_BYTES))
                if workflow is not None:
                    shutil.copyfile(workflow, path / "workflow.py")
                # Names of folders repeat; samples must not be taken for those of another run.
                if start is not None:
                    write_whole(path / "start.json", encoded(start, indent=1))
                identity = f"{path.name}-{secrets.token_hex(4)}"
                started = {
                    "status": "running",
                    "identity": identity,
                    "started": _now(),
                    **this_process(),
                }
                write_whole(path / "summary.json", encoded(started, indent=1))
            except OSError:
                _unmake(path, made)
                raise
        return cls(path)

    @classmethod
    def of(cls, folder: RunFolder | str | Path) -> RunFolder:
        """The folder of a new run: as it is given, or made at a path. Raises as `create`."""
        return folder if isinstance(folder, RunFolder) else cls.create(folder)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @property
    def started(self) -> float:
        """When the run began, seconds since the epoch: from then on every display counts. Now where that is unknown."""
        said, now = self.summary().get("started"), datetime.now(UTC).timestamp()
        return min(now, datetime.fromisoformat(said).timestamp()) if said else now

    def start(self) -> dict[str, Any]:
        """What the command line has said of its start: `from`, folders of earlier runs, and `memory`, a folder."""
        try:
            found = read_json(self.path / "start.json")
        except FileNotFoundError:
            found = {}
        return {"from": found.get("from") or [], "memory": found.get("memory")}

    @property
    def identity(self) -> str:
        """By which its samples are known in other runs and in memories: the folder's first name, and a random part."""
        return str(self.summary().get("identity") or self.name)

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self.path / "checkpoints"

    @property
    def models(self) -> Path:
        """Where the model store keeps its versions."""
        return self.path / "models"

    def adopt(self) -> None:
        """Say that the run is this process's by now, which another one has made the folder for."""
        self.write_summary(this_process())

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Add a line to events.jsonl. Raises OSError (a full disk, say); what was there stays readable."""
        with explained(self.path), open(self.path / "events.jsonl", "ab+", buffering=0) as log:
            append_lines(log, encoded(event))

    def events(self) -> list[dict[str, Any]]:
        """Every event written so far, in order; lines that were cut short are left out.

        Raises ValueError for a log of more than 16 GiB, and for one that is elsewhere.
        """
        path = self.path / "events.jsonl"
        try:
            log = own_file(path, self.path).open("rb")
        except FileNotFoundError:
            return []
        with log:
            return list(self._decoded(log))

    def _decoded(self, log: IO[bytes]) -> Iterator[dict[str, Any]]:
        size = os.fstat(log.fileno()).st_size
        if size > _MOST_EVENTS:
            raise ValueError(f"found {self.path}/events.jsonl of {size:,} bytes, expected at most {_MOST_EVENTS:,}")
        number = 0
        while line := log.readline(_MOST_LINE):
            number += 1
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                logger.info("%s/events.jsonl: line %d was cut short, left out", self.path, number)
                continue
            if isinstance(event, dict):
                yield event

    def summary(self) -> dict[str, Any]:
        """The figures written so far."""
        return read_json(self.path / "summary.json")

    def write_summary(self, figures: Mapping[str, Any]) -> None:
        """Merge figures into summary.json, nested objects key by key. A number that is not finite becomes null."""
        self.write_file("summary.json", encoded(_merged(self.summary(), figures), indent=1))

    def write_file(self, name: str, content: bytes) -> Path:
        """Write a file of the folder whole: a reader sees the old content or the new. Raises OSError."""
        path = self.path / name
        with explained(path):
            write_whole(path, content)
        return path

    def write_object(self, scan: str, image: xr.Dataset) -> None:
        """Write the live object of a scan as the group `scan` of object.zarr, in place of an earlier one.

        image: dims (y, x) for images and (frame) for what belongs to frames. Raises OSError, ValueError for a name
        that no folder can have.
        """
        if scan_name(scan) != scan:
            raise ValueError(
                f"found a scan named {scan!r}, expected 1 to 100 bytes in UTF-8, no slash, no leading dot, nothing "
                f"that cannot be printed: call it {scan_name(scan)!r}, say"
            )
        with explained(self.path / "object.zarr"):
            write_scan(self.path / "object.zarr", scan, image)

    def objects(self) -> dict[str, xr.Dataset]:
        """The live objects by scan, loaded, in the order in which the scans were measured."""
        store, order = self.path / "object.zarr", self.summary().get("scans") or []
        names = sorted(scans_in(store), key=lambda name: order.index(name) if name in order else len(order))
        return {name: read_scan(store, name) for name in names}

    def refinement(self, scan: str) -> str:
        """How the refined object that is saved of a scan came about, in words; empty where none is saved, or nothing of
        it can be read."""
        try:
            saved = read_json(self.path / "object.zarr" / scan / "zarr.json")
            return str(saved["attributes"]["refinement"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def end(self, status: str, reason: str = "", *, traceback: str = "") -> None:
        """Say how the run ended (finished, failed, interrupted), in the summary and as the event RunEnded.

        Never raises: where not even the ballast made room, the log of the process says so.
        """
        if status not in ENDINGS:
            logger.error("found the ending %r, expected one of %s; written as failed", status, ENDINGS)
            status, reason = "failed", reason or status
        event = {"event": "RunEnded", "time": datetime.now(UTC).timestamp(), "status": status, "reason": reason}
        try:
            (self.path / ".ballast").unlink(missing_ok=True)
            self.write_summary({"status": status, "reason": reason, "ended": _now()})
            self.append_event(event | ({"traceback": traceback} if traceback else {}))
        except (OSError, ValueError) as error:
            logger.error("%s: could not write down that the run %s (%s): %s", self.path, status, reason, error)


def append_lines(log: IO[bytes], lines: bytes) -> None:
    """Add whole lines to a log of events that is open unbuffered, for reading and appending."""
    size = log.seek(0, os.SEEK_END)
    if size:
        log.seek(size - 1)
        if log.read(1) != b"\n":  # the last writer was cut short: leave its torn line to itself
            lines = b"\n" + lines
    while lines:
        lines = lines[log.write(lines) :]


def encoded(value: Mapping[str, Any], indent: int | None = None) -> bytes:
    """As a line of JSON."""
    return (json.dumps(_plain(value), indent=indent, allow_nan=False) + "\n").encode()


def this_process() -> dict[str, Any]:
    """By which others find out whether it is alive."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    """The value in JSON's own types: arrays as lists, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return merged


def _claim(path: Path, made: list[Path]) -> None:
    """Make the folder of a run this process's: of several runs that begin there at the same moment, that of one."""
    taken = FileExistsError(f"{path}: found a folder with files in it, expected a new or empty one")
    if path.is_dir() and any(path.iterdir()):
        raise taken
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "models").mkdir()
    except OSError as error:
        _unmake_folders(made)
        raise taken if (path / "models").is_dir() else error from None


def _unmake(path: Path, made: list[Path]) -> None:
    """Take away what `create` began; made: the folders that were missing before, deepest first."""
    for entry in (".ballast", "workflow.py", "start.json", "summary.json"):
        with contextlib.suppress(OSError):
            (path / entry).unlink()
    _unmake_folders([path / "models", *made])


def _unmake_folders(made: list[Path]) -> None:
    for folder in made:
        with contextlib.suppress(OSError):  # somebody has put something there meanwhile
            folder.rmdir()


_ADVICE = {
    errno.ENOSPC: "found a full disk, expected room for the run: free some space or choose another folder",
    errno.EDQUOT: "found the disk quota used up, expected room for the run: free some space or choose another folder",
    errno.EROFS: "found a read-only file system, expected one that can be written: choose another folder",
    errno.EACCES: "found no permission to write, expected a folder of your own: choose another one",
    errno.ENOTDIR: "found a file where a folder is needed: choose another folder",
    errno.EEXIST: "found a file where a folder is needed: choose another folder",
}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the file system say what was found, what was expected and what to do."""
    try:
        yield
    except OSError as error:
        answer = _ADVICE.get(error.errno or 0)
        if answer is None:
            raise
        explained = type(error)(f"{path}: {answer}")
        explained.errno = error.errno
        raise explained from error
