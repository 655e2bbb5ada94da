"""`steering attach` and `steering list`: runs that other processes have started."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steering.commands.words import add_insecure, say, short

if TYPE_CHECKING:
    from steering.runner.folder import RunFolder


def add_commands(commands: Any) -> None:
    """Add both to the parser's commands."""
    attach = commands.add_parser(
        "attach",
        help="show a run that goes on, until it ends or Ctrl-C",
        description="Show the live display of a run that goes on. Ctrl-C leaves it; the run goes on.",
    )
    attach.add_argument("folder", metavar="DIR", help="folder of a run; of one that has finished it says so")
    add_insecure(attach)
    attach.set_defaults(command=_attach)
    found = commands.add_parser("list", help="list the runs below a folder, newest last, with their state")
    found.add_argument("folder", metavar="DIR", nargs="?", default="runs", help="where to look (runs)")
    found.set_defaults(command=_list)


def _attach(chosen: argparse.Namespace) -> int:
    from steering.runner.attach import attach  # noqa: PLC0415
    from steering.runner.client import show_all  # noqa: PLC0415
    from steering.runner.folder import RunFolder  # noqa: PLC0415
    from steering.runner.liveness import ended  # noqa: PLC0415
    from steering.view.progress import Progress  # noqa: PLC0415

    # The cluster of a run that ends goes away under this client: what counts stands in the run's folder.
    for name in ("distributed", "distributed.client", "distributed.core"):  # Dask gives each a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    folder = RunFolder(chosen.folder)
    try:
        _until_begun(folder)
    except KeyboardInterrupt:
        return _left(folder)
    if folder.summary().get("status") == "finished":
        say(f"{folder.name} {ended(folder)}: `steering status {short(folder.path)}` says what it left")
        return 0
    with attach(folder, insecure=chosen.insecure) as run:
        try:
            show_all(run.watch(), Progress())
        except KeyboardInterrupt:
            return _left(folder)
        run.result()
        say(f"{folder.name} {ended(folder)}")
    return 0


def _until_begun(folder: RunFolder) -> None:
    """Wait for the campaign of a run that starts, and say what it waits for."""
    from steering.runner.liveness import gone, whereabouts  # noqa: PLC0415
    from steering.view.status import waits_for  # noqa: PLC0415

    said: list[str] = []
    while not whereabouts(folder) and folder.summary().get("status") == "running" and not gone(folder):
        if said != (now := waits_for(folder) or ["starting"]):
            said = now
            say("; ".join(now))
        time.sleep(0.5)


def _left(folder: RunFolder) -> int:
    say(f"left; {folder.name} goes on: `steering stop {short(folder.path)}` ends it")
    return 0


def _list(chosen: argparse.Namespace) -> int:
    from steering.view.listing import listing  # noqa: PLC0415

    for line in listing(Path(chosen.folder)):
        say(line)
    return 0
