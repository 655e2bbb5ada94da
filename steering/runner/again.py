"""Which workflow a run is of, and whether it can go on after all its processes are gone."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering.files import read_json
from steering.runner.event_log import events_after
from steering.runner.folder import RunFolder
from steering.runner.lock import refuse_held
from steering.runner.manifest import newest_whole
from steering.runner.noted import FILE as STOP, noted_stop

_FILE, _NEXT = "workflow.json", "workflow.next.json"


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A run that was begun, and whose processes are gone."""

    folder: RunFolder
    """Ready to go on."""
    workflow: Path
    arguments: tuple[str, ...]
    checkpoint: int
    """Number of the one from which it goes on."""
    age_s: float
    """Seconds between the checkpoint and the run's last event."""
    remarks: tuple[str, ...]


def note_workflow(folder: RunFolder, workflow: Path, arguments: list[str]) -> dict[str, Any]:
    """Note in the folder what runs in it, for `recoverable`. Of a run that is recovered the arguments hold only once
    it goes on, see `note_going_on`: mistyped ones must not take the place of its own.

    Returns the summary of before. Raises OSError.
    """
    before = folder.summary()
    if not workflow.is_file():
        return before  # an experiment that Python has handed over: no command can begin it again
    content = {"workflow": str(workflow.absolute()), "arguments": arguments}
    folder.write_file(_NEXT if folder.recovering else _FILE, json.dumps(content, indent=1).encode())
    if folder.recovering:
        folder.adopt()  # it may wait in a queue, and is not gone meanwhile
    return before


def note_read(folder: RunFolder) -> None:
    """Note that a recovery has been read: the run can be stopped again. Raises OSError."""
    folder.write_summary({"status": "running", "reason": "", "ended": None})  # it may have failed before


def note_going_on(folder: RunFolder) -> None:
    """Note that a run goes on, by the arguments of its driver. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):  # another runner goes on for the same driver
        (folder.path / _NEXT).replace(folder.path / _FILE)


def note_left(folder: RunFolder, before: Mapping[str, Any]) -> None:
    """Have the folder of a run that was not continued be as it was. before: its summary. Raises OSError."""
    (folder.path / _NEXT).unlink(missing_ok=True)
    folder.write_summary(
        {name: before[name] for name in ("pid", "host", "status", "reason", "ended") if name in before}
    )


def recoverable(path: str | Path) -> Begun:
    """A run that can go on. Nothing of it is changed.

    Raises FileNotFoundError where there is no run, RuntimeError for one that has ended otherwise than by a failure, is
    alive, or has no checkpoint that can be used, ValueError for a checkpoint of another format.
    """
    folder = RunFolder(path, recovering=True)
    status = folder.summary().get("status")
    if status not in ("running", "failed"):  # a lost scheduler ends a run as failed
        raise RuntimeError(
            f"{folder.name}: found a run that is {status}, expected one that was killed before its end or has failed: "
            "start a new run"
        )
    refuse_held(folder)
    manifest, remarks = newest_whole(folder)
    last = max((float(e.get("time", 0.0)) for e in events_after(folder, manifest.event)[0]), default=manifest.time)
    workflow, arguments = _workflow(folder, remarks)
    if (stop := noted_stop(folder)) is not None:
        remarks.append(f"{folder.name} ends in order as soon as it goes on: {stop.by} has given a stop, in {STOP}")
    return Begun(
        folder=folder,
        workflow=workflow,
        arguments=arguments,
        checkpoint=manifest.number,
        age_s=max(0.0, last - manifest.time),
        remarks=tuple(remarks),
    )


def continued_by(folder: RunFolder) -> str:
    """By what a run goes on whose processes are all gone: a command, or for one that was started from Python a call."""
    if (folder.path / _FILE).is_file():
        return f"`steering recover {folder.path}`"
    return f'`run(experiment, client, RunFolder("{folder.path}", recovering=True))` in Python, which has started it'


def checkpoint_age(folder: RunFolder) -> tuple[int, float] | None:
    """Number and age, seconds, of the newest checkpoint that can be used; None for none."""
    try:
        manifest, _ = newest_whole(folder)
    except (RuntimeError, ValueError, OSError):
        return None
    return manifest.number, time.time() - manifest.time


def _workflow(folder: RunFolder, remarks: list[str]) -> tuple[Path, tuple[str, ...]]:
    """The file as it ran: where it was, so that it finds the modules beside it, or the folder's own copy of it."""
    copy = folder.path / "workflow.py"
    try:
        noted = read_json(folder.path / _FILE)
        original, arguments = Path(noted["workflow"]), tuple(map(str, noted["arguments"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"{folder.name}: found no {_FILE} that can be read ({getattr(error, 'strerror', None) or error}), expected "
            f"it to name the workflow, as where `steering run` has started it: continue with {continued_by(folder)}"
        ) from error
    if original.is_file() and original.read_bytes() == copy.read_bytes():
        return original, arguments
    remarks.append(f"{original} is gone or was changed since: the run goes on with its copy {copy}")
    return copy, arguments
