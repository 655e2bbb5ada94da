"""Actors on the workers of a cluster."""

from __future__ import annotations

import asyncio

import pytest
from distributed import Client

from steering.runner.actors import place


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
        options = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
        async with Client(asynchronous=True, **options) as client:
            [worker] = await client.nthreads()
            handle = await place(client, mine, worker=worker)
            return await handle.actor.add()

    assert asyncio.run(counted()) == 1
    assert mine.count == 0
