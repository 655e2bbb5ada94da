"""Runs in a process of their own, which neither a terminal, a notebook nor a login session ends."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distributed import Client
from distributed.protocol import pickle

from steering.clusters.credentials import folder_of
from steering.runner.attach import Attached, attach
from steering.runner.folder import RunFolder
from steering.runner.liveness import ended

if TYPE_CHECKING:
    from steering.runner.experiment import Experiment

LOG = "run.log"
"""In the run's folder: what a detached run prints."""
_LONGEST_S = 120.0
"""How long to wait for a sign of life: a workflow that runs no campaign gives none before its first figures."""
_LOOK_S = 0.1


class Process:
    """A process in a session of its own. Unlike one of `subprocess` it may outlive this one without a warning."""

    def __init__(self, command: Sequence[str], log: Path, stdin: bytes = b"") -> None:
        """Start it; what it prints is added to the log, and `stdin` is all that it reads."""
        reading, writing = os.pipe()
        out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        streams = [(os.POSIX_SPAWN_DUP2, reading, 0), (os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, out, 2)]
        self._code: int | None = None
        try:
            self.pid = os.posix_spawn(command[0], list(command), os.environ, file_actions=streams, setsid=True)
        finally:
            os.close(reading)
            os.close(out)
        with os.fdopen(writing, "wb") as pipe, contextlib.suppress(BrokenPipeError):  # it has ended already
            pipe.write(stdin)

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        while (code := self.poll()) is None:
            time.sleep(_LOOK_S)
        return code


def launch(folder: RunFolder, words: Sequence[str], handed_over: bytes = b"") -> Process:
    """Start `steering run` with these words on a folder that is there, in a session of its own.

    handed_over: what it reads from its standard input, which is closed then.
    """
    command = [sys.executable, "-m", "steering.cli", "run", "--adopt", str(folder.path), *words]
    return Process(command, folder.path / LOG, handed_over)


def until_up(folder: RunFolder, process: Process) -> int | None:
    """Wait for the run to have begun, or to wait in a queue; its exit code where it has ended instead."""
    before = _signs(folder)
    deadline = time.monotonic() + _LONGEST_S
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None:
            return code
        if _signs(folder) != before:
            return None if _runs(folder) else process.wait()
        time.sleep(_LOOK_S)
    return None


def _runs(folder: RunFolder) -> bool:
    try:
        return folder.summary().get("status") == "running"
    except FileNotFoundError:  # wrong arguments: it has taken its folder away
        return False


def _signs(folder: RunFolder) -> list[object]:
    """What changes when a run has begun: a campaign that can be reached, jobs in a queue, or first figures."""
    there: list[object] = [(folder.path / name).exists() for name in ("scheduler.json", "jobs.json", "events.jsonl")]
    try:
        return [*there, {key for key in folder.summary() if key not in ("pid", "host")}]
    except FileNotFoundError:
        return there


def start_detached(experiment: Experiment, where: Client | str, folder: RunFolder) -> Attached:
    """Have a process of its own open the cluster and run the experiment to its end, its report included.

    where: as `steering.cluster` takes it, or a client of a cluster that outlives this process. Returns once the
    campaign can be reached: a cluster in a queue may take as long as the queue. Raises RuntimeError where the run has
    ended before, ValueError for a cluster that ends with this process.
    """
    if isinstance(where, Client) and where.cluster is not None:
        raise ValueError(
            "found a cluster of this process, which ends with it, expected one that outlives it: "
            'name it, as in start(experiment, "local", folder, detach=True)'
        )
    address = where if isinstance(where, str) else where.scheduler.address
    words = [] if isinstance(where, str) else ["--insecure"]  # who has opened it has said so
    if not isinstance(where, str) and (credentials := folder_of(where.security)) is not None:
        words.append(f"--credentials={credentials}")
    process = launch(folder, ["--handed-over", address, "-", *words], pickle.dumps(experiment))
    while not (folder.path / "scheduler.json").exists():
        if process.poll() is not None:
            log = (folder.path / LOG).read_text(errors="replace").splitlines()[-5:]
            raise RuntimeError(f"{folder.name}: found a run that {ended(folder)}; its last lines: {' / '.join(log)}")
        time.sleep(_LOOK_S)
    return attach(folder)


def handed_over(data: bytes) -> Experiment:
    """The experiment that the process which has started this one wrote to its standard input."""
    experiment: Experiment = pickle.loads(data)
    return experiment
