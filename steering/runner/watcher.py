"""The watcher of a run on a cluster that outlives its driver: where no driver is there any more, it starts another
runner in the place of a lost one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from distributed import Client, get_client, get_worker

from steering.clusters.credentials import as_client
from steering.clusters.roles import INFERENCE, LABEL, SOURCE, Workers, addresses, workers_now
from steering.runner.actors import place, unpublish
from steering.runner.ending import WATCHER, connected
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.liveness import whereabouts
from steering.runner.manifest import any_whole
from steering.runner.watch import OneWorker, fence

_LOOK_S = 1.0
"""Between two looks."""

GoOn = Callable[[Experiment, Client, RunFolder], Any]
"""Has another runner go on with a run, and waits for its end."""

logger = logging.getLogger(__name__)


class Watcher:
    """Watches over one runner; the next one has a watcher of its own."""

    def __init__(self, experiment: Experiment, folder: RunFolder, driver: str | None, go_on: GoOn) -> None:
        """driver: id of the Dask client that started the run, which does the same for as long as it is there."""
        self.experiment, self.folder, self.driver, self.go_on = experiment, folder, driver, go_on

    async def watch(self, runner: str) -> None:
        """Begin to watch, for as long as the run goes on with the runner on this worker."""
        # A task of its own: the call ends with the runner that has made it.
        self._watching = asyncio.create_task(self._watch(runner))

    async def _watch(self, runner: str) -> None:
        client, key = await get_client(), whereabouts(self.folder).get("key")
        place, lost = OneWorker(runner, self.experiment.frozen_s), 0
        while lost < 2:  # the run's end and its worker's may come in one moment
            await asyncio.sleep(_LOOK_S)
            if WATCHER not in await client.list_datasets() or whereabouts(self.folder).get("key") != key:
                return  # the run has ended, or another runner goes on
            if await connected(self.driver):
                lost = 0
                continue
            workers = await workers_now(client)
            if place.silent(workers) and any_whole(self.folder):  # else nobody could go on in its place
                await fence(client, runner)
            lost = 0 if runner in workers else lost + 1
        logger.warning("the runner's worker is lost, and no driver is there: starting another runner")
        await asyncio.to_thread(self._start_another, client.scheduler.address, as_client(get_worker().security))

    def _start_another(self, address: str, security: Any) -> None:
        with Client(address, security=security, timeout=60, set_as_default=False) as client:
            self.go_on(self.experiment, client, self.folder)


class Watched:
    """Keeps a watcher on the cluster while a run goes on."""

    def __init__(self, client: Client, watcher: Watcher, here: str) -> None:
        """here: address of the runner's own worker."""
        self._client, self._watcher, self._here = client, watcher, here
        self._where = ""
        self._placing: asyncio.Future | None = None

    def look(self, workers: Workers) -> None:
        """Place a watcher where there is none, on a worker that is not the runner's and trains nothing."""
        if self._where in workers or (self._placing is not None and not self._placing.done()):
            return
        found = [one for role in (LABEL, SOURCE, INFERENCE) for one in addresses(workers, role) if one != self._here]
        if found:
            self._where = found[0]
            self._placing = asyncio.ensure_future(self._place(found[0]))
            self._placing.add_done_callback(_failed)

    async def _place(self, worker: str) -> None:
        await unpublish(self._client, WATCHER)
        handle = await place(self._client, self._watcher, worker=worker)
        await self._client.publish_dataset(handle.future, name=WATCHER)
        await handle.actor.watch(self._here)


def _failed(placing: asyncio.Future) -> None:
    if not placing.cancelled() and placing.exception() is not None:
        logger.warning("found no watcher over the runner: %s", placing.exception())
