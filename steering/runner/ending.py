"""How a run ends where the process that started it is gone: the runner says so in the folder, and has the report
written."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Mapping
from typing import Any

from distributed import get_client

from steering.campaign import Campaign
from steering.runner.actors import unpublish
from steering.runner.folder import RunFolder
from steering.runner.handover import HandedOver
from steering.runner.stream_lines import ended_lines

WATCHER = "steering-watcher"
"""Under which the watcher of a run is published on its cluster, so that it lives when the runner is lost."""

logger = logging.getLogger(__name__)


async def ending_with(
    work: Awaitable[dict[str, Any]], folder: RunFolder, name: str | None, driver: str | None
) -> dict[str, Any]:
    """The result of a whole run. Raises what it raised.

    name: under which the runner is published, withdrawn at the end. driver: id of the Dask client that started it. What
    `steering run` started it also ends, for as long as that process is there; else the end and the report are written
    from here. A worker that is shut down writes nothing: whoever does that knows.
    """
    try:
        figures = await work
        await _write(folder, driver, "finished")
        return figures
    except HandedOver:
        (folder.path / "scheduler.json").unlink(missing_ok=True)  # until another runner says where it is
        raise
    except Exception as error:
        await _write(folder, driver, "failed", error)
        raise
    finally:
        if name is not None:
            client = await get_client()
            for one in (name, WATCHER):
                await unpublish(client, one)


async def _write(folder: RunFolder, driver: str | None, status: str, error: Exception | None = None) -> None:
    started_by_command = (folder.path / "workflow.py").exists()
    if started_by_command and await connected(driver):
        return
    reason = "" if error is None else str(error) or type(error).__name__
    lines = "" if error is None else "".join(traceback.format_exception(error))
    await asyncio.to_thread(folder.end, status, reason, traceback=lines)
    if started_by_command:  # the report is made by a floor above, in a process of its own
        await asyncio.to_thread(report, folder)


def refuse_nothing(campaign: Campaign, streams: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises RuntimeError for a campaign that ended by itself without one frame. streams: their figures."""
    if not campaign.frames and not campaign.stopped:
        lines = "; ".join(ended_lines(streams))
        raise RuntimeError(
            f"found no frame in the whole run when its source ended, expected some: {lines or 'is it the right scan?'}"
        )


async def connected(driver: str | None) -> bool:
    """Whether the process that started the run still holds on to the cluster."""
    try:
        client = await get_client()
        # A function without a module travels by value: a scheduler need not have steering installed.
        there: bool = await client.run_on_scheduler(lambda dask_scheduler: driver in dask_scheduler.clients)
        return there
    except Exception as error:
        logger.warning("could not ask the scheduler whether the driver is there: %s", error)
        return True


def report(folder: RunFolder) -> None:
    """Have the report of a run that has ended written, in a process of its own."""
    command = [sys.executable, "-m", "steering.cli", "report", str(folder.path)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=600
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.error("%s: the report could not be written: %s", folder.path, error)
        return
    if done.returncode:
        logger.error("%s: the report could not be written: %s", folder.path, done.stderr.strip())
