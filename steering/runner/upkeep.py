"""Keeps a run complete: new ranks join in place of lost ones, and whoever is lost or silent is noticed and reported."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from distributed import Client

from steering.campaign import Event, WorkerLost
from steering.campaign.gate import Gate
from steering.clusters.roles import LABEL, TRAINER, Workers, addresses
from steering.runner.event_log import EventLog
from steering.runner.experiment import Experiment
from steering.runner.fallback import Fallback
from steering.runner.handover import HandOver
from steering.runner.optional import Optional
from steering.runner.predictor_proxy import PredictorProxy
from steering.runner.rank_group import RankGroup
from steering.runner.source_proxy import SourceProxy
from steering.runner.watch import Watch
from steering.runner.watcher import Watched, Watcher

_FIRST_REST_S, _LONGEST_REST_S = 2.0, 120.0
"""After a rank could not join, its worker is tried again after so long, and each time after twice as long."""


@dataclass(kw_only=True)
class Upkeep:
    """Looks after the workers of a run while it measures and learns."""

    client: Client
    here: str
    """Address of the runner's own worker: silence there is for others to notice."""
    experiment: Experiment
    ranks: RankGroup
    proxy: PredictorProxy
    source: SourceProxy
    optional: Optional
    start: Callable[[Coroutine[Any, Any, None]], None]
    """Starts work beside."""
    event_log: EventLog
    log: Callable[[Event], None]
    """Where events go: they call for no action."""
    watcher: Watcher | None
    """To be placed where the cluster outlives the driver."""
    gate: Gate
    """Of the campaign: it says what a source may measure that is left alone."""
    handover: HandOver
    _known: Workers = field(default_factory=dict)
    """At the last look."""
    _labelling: set[str] = field(default_factory=set)
    """Workers of the role label that have imported what they need; until then they may hold the interpreter lock."""
    _joining: set[str] = field(default_factory=set)
    _rest: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of workers whose rank could not join: until when they are let alone, and for how long."""

    def __post_init__(self) -> None:
        self._placed = None if self.watcher is None else Watched(self.client, self.watcher, self.here)

    async def keep(self) -> None:
        """Look after them for ever."""
        watch = Watch(self.client, self.experiment.frozen_s, watched=self._watched, seen=self._seen)
        await asyncio.gather(watch.keep(), Fallback(self.experiment, self.source, self.gate).keep())

    def _watched(self) -> set[str]:
        return {*self.ranks.addresses, self.proxy.address, self.source.address, *self._labelling} - {self.here}

    def _seen(self, workers: Workers, frozen: list[str]) -> None:
        self._report(workers, frozen)
        if self.event_log.trouble is not None:
            self.optional.note("writing events.jsonl, for now,", self.event_log.trouble)
        for address in set(addresses(workers, LABEL)) - set(self._known):
            self.start(self._ready_to_label(address))
        self._known = workers
        self._let_join(workers)
        if self._placed is not None:
            self._placed.look(workers)
        self.handover.look(workers, joining=bool(self._joining))

    def _report(self, workers: Workers, frozen: list[str]) -> None:
        """Report which workers of the run are lost since the last look."""
        for address in set(self._known) - set(workers):
            worker = self._known[address]
            if any(worker["resources"].values()):
                self.log(
                    WorkerLost(
                        time=time.time(),
                        worker=str(worker["name"]),
                        roles=tuple(sorted(worker["resources"])),
                        silent=address in frozen,
                    )
                )
            self._labelling.discard(address)
            self._rest.pop(address, None)
            if address == self.proxy.address:
                self.start(self._replace(self.proxy.number))

    async def _replace(self, number: int) -> None:
        await self.proxy.replaced(number)

    async def _ready_to_label(self, address: str) -> None:
        await self.client.run(_import_all, workers=[address], on_error="return")
        self._labelling.add(address)

    def _let_join(self, workers: Workers) -> None:
        now, there = time.monotonic(), {*self.ranks.addresses, *self._joining}
        free = [
            address
            for address in addresses(workers, TRAINER)
            if address not in there and self._rest.get(address, (0.0, 0.0))[0] <= now
        ]
        _, most = self.experiment.ranks_range
        staying = len(self.ranks) - len(self.handover.leaving(workers))
        room = len(free) if most is None else max(0, most - staying - len(self._joining))
        if free[:room]:
            self._joining.update(free[:room])
            self.start(self._admit(free[:room]))

    async def _admit(self, free: list[str]) -> None:
        joined = await self.optional.run("letting new ranks join", self.ranks.admit(free))
        self._joining.difference_update(free)
        for address in free:
            if joined is None:
                last = self._rest.get(address, (0.0, _FIRST_REST_S / 2))[1]
                rest = min(2 * last, _LONGEST_REST_S)
                self._rest[address] = (time.monotonic() + rest, rest)


def _import_all() -> None:
    """Runs on a worker: what labelling needs is imported with this module."""
