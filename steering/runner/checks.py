"""What is found out before a run begins: that its workers see its folder, and that their clocks agree."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from distributed import Client

from steering.clusters.roles import ROLES, workers_of
from steering.runner.folder import RunFolder
from steering.runner.liveness import there, whereabouts

logger = logging.getLogger(__name__)

SKEW_S = 1.0
"""Beyond which a difference of clocks is said: latencies between the machines are wrong by as much."""


def refuse_taken(folder: RunFolder) -> None:
    """Raise RuntimeError where another campaign goes on in the folder. Who recovers a run knows that its runner is
    lost; from another machine it would look alive for as long as its cluster is reached."""
    if folder.recovering:
        return
    where = whereabouts(folder)
    if where and folder.summary().get("status") == "running" and there(where):
        raise RuntimeError(
            f"{folder.path}: found a campaign that goes on in this folder (its runner is process {where.get('pid')} of "
            f"{where.get('host')}), expected a folder of its own for each run: name another one"
        )


def refuse_hidden(client: Client, folder: RunFolder) -> None:
    """Raise RuntimeError where a worker does not see the run's folder; say where clocks disagree."""
    workers = workers_of(client)
    mine = [address for address, worker in workers.items() if any(worker["resources"].get(role) for role in ROLES)]
    mark = folder.path / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:
        asked = time.time()
        looked = client.run(_looking(), mark, workers=mine)
        answered = time.time()
    finally:
        mark.unlink(missing_ok=True)
    blind = sorted({str(urlsplit(address).hostname) for address, (seen, _) in looked.items() if not seen})
    if blind:
        raise RuntimeError(
            f"{folder.path}: found workers on {', '.join(blind)} that do not see this folder, expected a file system "
            "that all nodes share: name a folder on one with --out"
        )
    for address, (_, clock) in looked.items():
        skew = max(asked - clock, clock - answered)
        if skew > SKEW_S:
            logger.warning(
                "found the clock of %s %.1f s off, expected clocks that agree: latencies between these machines are "
                "wrong by as much; have the node's time set by NTP",
                urlsplit(address).hostname,
                skew,
            )


def _looking() -> Callable[[Path], tuple[bool, float]]:
    """What a worker does to see a file: it also says its time. It travels by value, so that no worker imports this
    package, and torch with it, within its event loop."""

    def sees(mark: Path) -> tuple[bool, float]:
        for _ in range(30):  # a network file system may take a moment
            if mark.exists():
                return True, time.time()
            with contextlib.suppress(OSError):
                os.listdir(mark.parent)  # has it read the folder anew
            time.sleep(0.1)
        return False, time.time()

    return sees
