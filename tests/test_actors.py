"""Actors on the workers of a cluster."""

from __future__ import annotations

import asyncio
import pickle

import pytest
from distributed import Client, Event, LocalCluster

from steering.runner.actors import Reached, place


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


@pytest.mark.slow
def test_an_actor_of_the_same_process_is_its_workers_own() -> None:
    """Dask hands over the very object there: what the actor changed would change under its sender, who may be sending
    it to somebody else."""
    mine = Counter()

    async def counted() -> int:
        options = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
        async with Client(asynchronous=True, **options) as client:
            [worker] = await client.nthreads()
            handle = await place(client, mine, worker=worker)
            return await handle.actor.add()

    assert asyncio.run(counted()) == 1
    assert mine.count == 0


class Silent:
    """Never answers, as an actor whose runner is lost."""

    async def ask(self) -> None:
        await Event("asked").set()
        await asyncio.sleep(1000)


def ask(sent: bytes) -> None:
    """As a label maker, on another worker, asks a predictor."""
    pickle.loads(sent).ask().result()


@pytest.mark.slow
def test_a_task_does_not_wait_for_ever_for_an_actor_that_nobody_holds_any_more() -> None:
    """Dask never answers: the task would keep its worker's role, and no label would be made again."""

    async def asked() -> None:
        options = {"processes": False, "n_workers": 1, "threads_per_worker": 2, "dashboard_address": "127.0.0.1:0"}
        async with LocalCluster(asynchronous=True, **options) as cluster, Client(cluster, asynchronous=True) as client:
            async with Client(cluster, asynchronous=True) as runner:
                [worker] = await runner.nthreads()
                handle = await place(runner, Silent(), worker=worker)
                answer = client.submit(ask, pickle.dumps(Reached(handle.actor)), pure=False)
                await Event("asked", client=client).wait()
            await asyncio.wait_for(answer, 60)

    with pytest.raises(OSError, match="gone, expected its answer"):
        asyncio.run(asked())
