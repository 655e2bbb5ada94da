"""`steering run --detach`: the run lives in a process of its own, which no terminal and no login session ends."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steering.commands.words import complain, say, short

if TYPE_CHECKING:
    from steering.runner.folder import RunFolder

_DETACH, _QUIET = "--detach", "--quiet"


def add_options(run: argparse.ArgumentParser) -> None:
    """The options of `steering run` that belong to this."""
    run.add_argument(_DETACH, action="store_true", help="run in a process of its own; what it prints goes to run.log")
    run.add_argument(_QUIET, action="store_true", help="print only what went wrong; the rest goes to run.log")
    # How the detached process itself is started.
    run.add_argument("--adopt", metavar="DIR", help=argparse.SUPPRESS)
    run.add_argument("--handed-over", metavar="CLUSTER", help=argparse.SUPPRESS)


def take_flags(chosen: argparse.Namespace, arguments: list[str]) -> list[str]:
    """The arguments that are the workflow's; as with --out, the options may come after the workflow's name."""
    chosen.detach = chosen.detach or _DETACH in arguments
    chosen.quiet = chosen.quiet or _QUIET in arguments
    return [word for word in arguments if word not in (_DETACH, _QUIET)]


@contextlib.contextmanager
def silent(folder: RunFolder, quiet: bool) -> Iterator[None]:
    """Where it is to be quiet, what is printed goes to a file of the run's folder; what went wrong is said all the
    same."""
    if not quiet:
        yield
        return
    with open(folder.path / "run.log", "a", buffering=1) as log, contextlib.redirect_stdout(log):
        yield


def left_nothing(folder: RunFolder) -> bool:
    """Whether a workflow has written neither an event nor a figure: it found nothing to do, or has to come later."""
    untouched = {"status", "identity", "started", "pid", "host"}
    return not folder.events() and set(folder.summary()) <= untouched


def adopted(path: str) -> RunFolder:
    """The folder that the process which detached this one has made."""
    from steering.runner.folder import RunFolder  # noqa: PLC0415

    folder = RunFolder(path)
    folder.adopt()
    return folder


def handed_over(where: str) -> Callable[[RunFolder, list[str]], Any]:
    """A `main` that runs the experiment from standard input on a cluster, see steering.runner.detached."""

    def main(folder: RunFolder, arguments: list[str]) -> None:
        from steering.clusters import cluster, existing  # noqa: PLC0415
        from steering.runner import run  # noqa: PLC0415
        from steering.runner.detached import handed_over  # noqa: PLC0415
        from steering.view.progress import Progress  # noqa: PLC0415

        experiment = handed_over(sys.stdin.buffer.read())
        of_client = argparse.ArgumentParser()
        of_client.add_argument("--insecure", action="store_true")
        of_client.add_argument("--credentials")
        said = of_client.parse_args(arguments)
        ranks = 2 if experiment.ranks is None else experiment.ranks_range[0]
        if said.credentials is None:
            opened = cluster(where, ranks=ranks, folder=folder.path, insecure=said.insecure)
        else:
            opened = existing(where, ranks=ranks, credentials=said.credentials, insecure=said.insecure)
        with opened as client:
            run(experiment, client, folder, show=Progress())

    return main


def run(folder: RunFolder, workflow: Path, arguments: list[str]) -> int:
    """Start the workflow in a process of its own, and wait until it is up. Returns the exit code: that of the run where
    it has ended already, else 0."""
    from steering.runner.detached import LOG, launch, until_up  # noqa: PLC0415

    with open(folder.path / LOG, "ab+") as log:  # open: wrong arguments take the folder away, and the log with it
        process = launch(folder, [str(workflow), *arguments])
        say(f"run folder: {short(folder.path)}")
        try:
            code = until_up(folder, process)
        except KeyboardInterrupt:
            os.kill(process.pid, signal.SIGTERM)  # asked to end before it was up
            raise
        if code is not None:
            log.seek(0)
            return _ended_already(folder, log.read().decode("utf-8", "replace"), code)
    where = short(folder.path)
    say(f"detached, process {process.pid}; what it prints goes to {where}/{LOG}")
    say(f"`steering attach {where}` shows it, `steering stop {where}` ends it")
    warning = lingering()
    if warning:
        complain(warning)
    return 0


def _ended_already(folder: RunFolder, said: str, code: int) -> int:
    for line in [line for line in said.splitlines() if not line.startswith("run folder:")][-20:]:
        if line.startswith("steering: "):
            complain(line.removeprefix("steering: "))
        else:
            say(line)
    if folder.path.exists() and folder.summary().get("pid") == os.getpid():
        shutil.rmtree(folder.path)  # the workflow could not even be loaded
    return code


def lingering() -> str:
    """Where this system ends what a user leaves running at logout, a sentence that says so; else nothing."""
    if shutil.which("busctl") is None or not os.environ.get("XDG_SESSION_ID"):
        return ""
    bus = ["org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager", "KillUserProcesses"]
    try:
        asked = subprocess.run(["busctl", "get-property", *bus], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if asked.stdout.strip() != "b true":
        return ""
    return (
        "this system ends a user's processes at logout (KillUserProcesses=yes in logind.conf): run once "
        "`loginctl enable-linger`, and start the run by `systemd-run --user --scope steering run --detach ...`"
    )
