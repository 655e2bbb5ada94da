"""A function on every trainer rank at once: for work that is no campaign, such as the benchmarks of learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from distributed import Client
from distributed.utils import get_ip

from steering.clusters.roles import TRAINER, addresses, workers_of
from steering.learning import MeetingPoint, Place
from steering.learning.group import leave


def on_ranks(
    client: Client,
    work: Callable[..., Any],
    *arguments: Any,
    ranks: int,
    interface: str | None = None,
    deadline: float = 120.0,
) -> list[Any]:
    """Run `work(place, *arguments)` on workers with the resource trainer, one rank each; what each returned, by rank.

    Arguments are sent to each worker once. deadline: seconds that a rank waits for the others in a collective.
    Raises RuntimeError where there are fewer workers than ranks, and what any rank raised.
    """
    homes = addresses(workers_of(client), TRAINER)[:ranks]
    if len(homes) < ranks:
        raise RuntimeError(
            f"found {len(homes)} workers with the resource trainer, expected {ranks}: start a cluster with as many"
        )
    meeting = MeetingPoint(_own_address(client), interface=interface)
    there = [client.scatter(thing, workers=homes, broadcast=True, hash=False) for thing in arguments]
    futures = [
        client.submit(
            _placed,
            work,
            Place(rank=rank, ranks=ranks, where=meeting.rendezvous, deadline=deadline),
            *there,
            workers=[home],
            allow_other_workers=False,
            resources={TRAINER: 1},
            pure=False,
        )
        for rank, home in enumerate(homes)
    ]
    return client.gather(futures)


def _own_address(client: Client) -> str:
    """The driver's address as the cluster's workers reach it."""
    host = urlsplit(client.scheduler.address).hostname or "127.0.0.1"
    return host if host.startswith("127.") else get_ip(host)


def _placed(work: Callable[..., Any], place: Place, *arguments: Any) -> Any:
    try:
        return work(place, *arguments)
    finally:
        leave()
