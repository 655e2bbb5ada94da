"""Which workers of a cluster carry which role. A role is a Dask resource of a worker, of at least 1."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distributed import Client

TRAINER, INFERENCE, SOURCE, LABEL, RUNNER = ROLES = ("trainer", "inference", "source", "label", "runner")
"""`trainer` on one worker for each rank; each of the others on at least one worker."""

_LOOK_S = 0.2

Workers = Mapping[str, Mapping[str, Any]]
"""What the scheduler knows of each worker, by its address."""


def workers_of(client: Client) -> Workers:
    """The workers of a cluster, for a client that blocks."""
    # Not `client.scheduler_info`: the client's own look at the scheduler, every two seconds, leaves it without workers.
    workers: Workers = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    return workers


async def workers_now(client: Client) -> Workers:
    """The same for a client on an event loop: asked of the scheduler, not remembered."""
    workers: Workers = (await client.scheduler.identity(n_workers=-1))["workers"]
    return workers


def addresses(workers: Workers, role: str) -> list[str]:
    """Addresses of the workers that carry a role, in the order of their names."""
    named = sorted(workers.items(), key=lambda item: str(item[1]["name"]))
    return [address for address, worker in named if worker["resources"].get(role, 0) >= 1]


def lay_down(client: Client, names: Sequence[str]) -> None:
    """Have workers, by their names, carry no role any more: nothing new is placed on them, and who has something there
    hands it over. What they do goes on meanwhile."""
    client.run_on_scheduler(_without_roles, names=list(names))


def _without_roles(dask_scheduler: Any, names: list[str]) -> None:
    for address, worker in list(dask_scheduler.workers.items()):
        if worker.name in names:
            dask_scheduler.add_resources(worker=address, resources=dict.fromkeys(worker.resources, 0))


def ending(workers: Workers, address: str, role: str) -> bool:
    """Whether a worker that had a role is there and carries it no more: its job is about to end."""
    return address in workers and workers[address]["resources"].get(role) == 0


_AWAITED = "steering-awaited"


def announce(client: Client, roles: Sequence[str]) -> None:
    """Say for which roles a job waits in a queue: who lost a worker of one waits for as long as that takes."""
    client.set_metadata([_AWAITED], list(roles))


async def worker_for(client: Client, role: str, patience_s: float) -> str | None:
    """Address of a worker that carries a role, once there is one; None where none comes within so many seconds, time
    in which a job for it waits in a queue not counted. On an event loop."""
    found: list[str] = []

    def lacks(workers: Workers) -> list[str]:
        found[:] = addresses(workers, role)
        return [] if found else [role]

    return found[0] if await _came(client, lacks, patience_s) else None


async def all_there(client: Client, ranks: int, patience_s: float) -> bool:
    """Whether every role has its workers, trainer as many as `ranks`, within so many seconds, counted as above."""
    return await _came(client, lambda workers: list(missing(workers, ranks=ranks)), patience_s)


async def _came(client: Client, lacks: Callable[[Workers], list[str]], patience_s: float) -> bool:
    until = time.monotonic() + patience_s
    while roles := lacks(await workers_now(client)):
        if set(roles) & set(await client.get_metadata([_AWAITED], default=[])):
            until = time.monotonic() + patience_s
        elif time.monotonic() > until:
            return False
        await asyncio.sleep(_LOOK_S)
    return True


def missing(workers: Workers, *, ranks: int) -> dict[str, int]:
    """How many workers of each role a campaign with so many ranks lacks; empty where none is missing."""
    needed = {role: ranks if role == TRAINER else 1 for role in ROLES}
    lacks = {role: count - len(addresses(workers, role)) for role, count in needed.items()}
    return {role: count for role, count in lacks.items() if count > 0}


def refusal(found: int, scheduler: str, lacks: Mapping[str, int]) -> str:
    """That a cluster lacks workers, in words, with the commands that start them."""
    lines = [
        f'dask worker {scheduler} --nthreads 1 --memory-limit 0 --dashboard-address 127.0.0.1:0 --resources "{role}=1"'
        for role, count in lacks.items()
        for _ in range(count)
    ]
    return (
        f"found {found} workers at {scheduler}, missing "
        + ", ".join(f"{count} with the resource {role}" for role, count in lacks.items())
        + "; expected one worker process for each. Start:\n"
        + "\n".join(lines)
    )
