"""How a run ends, for those who did not start it: the runner keeps its result, and writes the end where nobody else
will."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import traceback
from collections.abc import Awaitable
from typing import Any

from distributed import get_client

from steering.runner.folder import RunFolder

logger = logging.getLogger(__name__)


class Ending:
    """Of one run: its result, and who says in the folder how it ended."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._over = asyncio.Event()
        self._figures: dict[str, Any] = {}
        self._error: Exception | None = None

    @property
    def status(self) -> str | None:
        """`finished` or `failed`; None for a run that goes on."""
        if not self._over.is_set():
            return None
        return "finished" if self._error is None else "failed"

    async def of(self, work: Awaitable[dict[str, Any]], name: str | None, driver: str | None) -> dict[str, Any]:
        """The result of the whole run. Raises what it raised.

        name: under which the runner is published, withdrawn at the end. driver: id of the Dask client that started it.
        What `steering run` started it also ends, for as long as that process is there; else the end and the report are
        written from here.
        """
        try:
            self._figures = await work
        except Exception as error:
            self._error = error
            raise
        finally:  # also where the worker is shut down, which is no end of its own: that process is gone
            self._over.set()
            if self._figures or self._error is not None:
                await self._written(driver)
            if name is not None:
                await (await get_client()).unpublish_dataset(name)
        return self._figures

    async def result(self) -> dict[str, Any]:
        """Wait for the end. Returns the figures of summary.json; raises what ended the run early."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        return self._figures

    async def _written(self, driver: str | None) -> None:
        started_by_command = (self._folder.path / "workflow.py").exists()
        if started_by_command and await _connected(driver):
            return
        reason = "" if self._error is None else f"{type(self._error).__name__}: {self._error}"
        told = "" if self._error is None else "".join(traceback.format_exception(self._error))
        await asyncio.to_thread(self._folder.end, self.status or "failed", reason, traceback=told)
        if started_by_command:  # the report is made by a floor above, in a process of its own
            await asyncio.to_thread(_report, self._folder)


async def _connected(driver: str | None) -> bool:
    """Whether the process that started the run still holds on to the cluster."""
    try:
        client = await get_client()
        # A function without a module travels by value: a scheduler need not have steering installed.
        there: bool = await client.run_on_scheduler(lambda dask_scheduler: driver in dask_scheduler.clients)
        return there
    except Exception as error:
        logger.warning("could not ask the scheduler whether the driver is there: %s", error)
        return True


def _report(folder: RunFolder) -> None:
    command = [sys.executable, "-m", "steering.cli", "report", str(folder.path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        logger.error("%s: the report could not be written: %s", folder.path, done.stderr.strip())
