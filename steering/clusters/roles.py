"""Which workers of a cluster carry which role. A role is a Dask resource of a worker, of at least 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distributed import Client

TRAINER, INFERENCE, SOURCE, LABEL, RUNNER = ROLES = ("trainer", "inference", "source", "label", "runner")
"""`trainer` on one worker for each rank; each of the others on at least one worker."""

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


def missing(workers: Workers, *, ranks: int) -> dict[str, int]:
    """How many workers of each role a campaign with so many ranks lacks; empty where none is missing."""
    needed = {role: ranks if role == TRAINER else 1 for role in ROLES}
    lacks = {role: count - len(addresses(workers, role)) for role, count in needed.items()}
    return {role: count for role, count in lacks.items() if count > 0}


def refusal(found: int, scheduler: str, lacks: Mapping[str, int]) -> str:
    """That a cluster lacks workers, in words, with the commands that start them."""
    lines = [
        f'dask worker {scheduler} --nthreads 1 --resources "{role}=1"'
        for role, count in lacks.items()
        for _ in range(count)
    ]
    return (
        f"found {found} workers at {scheduler}, missing "
        + ", ".join(f"{count} with the resource {role}" for role, count in lacks.items())
        + "; expected one worker process for each. Start:\n"
        + "\n".join(lines)
    )
