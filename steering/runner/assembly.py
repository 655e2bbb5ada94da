"""The actors of a run: where each is placed, and from what each begins or goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from distributed import Client

from steering.campaign import Event, Publish
from steering.clusters.roles import (
    INFERENCE,
    ROLES,
    RUNNER,
    SOURCE,
    TRAINER,
    addresses,
    all_there,
    missing,
    refusal,
    workers_now,
)
from steering.learning import MeetingPoint, Rank
from steering.models import ModelStore
from steering.runner.actors import answered, place
from steering.runner.earlier_runs import Start
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.manifest import checkpoints
from steering.runner.predictor_proxy import PredictorProxy
from steering.runner.rank_group import RankGroup
from steering.runner.recovery import Recovery, clean_store
from steering.runner.source_proxy import SourceProxy

_SET_UP_S = 300.0
"""How long the actors may take to be there: workers that import torch from a slow shared disk need a minute."""


@dataclass(frozen=True, kw_only=True)
class Actors:
    """All that a run has placed on the cluster."""

    source: SourceProxy
    proxy: PredictorProxy
    ranks: RankGroup


async def assemble(
    client: Client,
    experiment: Experiment,
    folder: RunFolder,
    begin: Start | Recovery,
    *,
    emit: Callable[[Event], None],
    log: Callable[[Event], None],
    due: Callable[[], bool],
) -> Actors:
    """Start source, predictor and ranks, with what a run begins with, or goes on from.

    emit: where events go to which the campaign answers. log: where all others go. due: whether a frame is asked for
    that has not come. Raises RuntimeError where the cluster lacks a role.
    """
    recovery = begin if isinstance(begin, Recovery) else None
    await all_there(client, experiment.ranks_range[0], 0.0)  # jobs may be on their way: what lacks then stays away
    workers = await workers_now(client)
    lacks = missing(workers, ranks=experiment.ranks_range[0])
    if lacks:
        raise RuntimeError(refusal(len(workers), client.scheduler.address, lacks))
    where = {role: addresses(workers, role) for role in ROLES}
    if recovery is not None:
        publishing = [action.version for action in recovery.open if isinstance(action, Publish)]
        await asyncio.to_thread(clean_store, ModelStore(folder.models), recovery.campaign, publishing)
    spool = checkpoints(folder) / "spool" if experiment.spool else None
    predictor = experiment.predictor(folder.models)
    handle = await place(client, predictor, worker=where[INFERENCE][0])
    base = None if recovery is None else recovery.predictor

    def reported() -> dict[str, set[int]]:
        return proxy.reported()

    source = SourceProxy(client, experiment, due=due, reported=reported, emit=log, spool=spool, folder=folder)
    proxy = PredictorProxy(client, predictor, handle, source, emit=emit, base=base)
    forming = _ranks(client, experiment, folder, emit, begin, where)
    ranks, _ = await asyncio.gather(forming, proxy.start())
    await source.start(where[SOURCE][0], handle.actor, None if recovery is None else recovery.source)
    return Actors(source=source, proxy=proxy, ranks=ranks)


async def in_time(set_up: Awaitable[None]) -> None:
    """Wait for all actors to be there. Raises RuntimeError where that takes too long."""
    try:
        await asyncio.wait_for(set_up, _SET_UP_S)
    except TimeoutError as late:
        raise RuntimeError(
            f"found the actors of the run not ready after {_SET_UP_S:.0f} s, expected them within that time: "
            "look at the workers' logs, and start the run again"
        ) from late


async def _ranks(
    client: Client,
    experiment: Experiment,
    folder: RunFolder,
    emit: Callable[[Event], None],
    begin: Start | Recovery,
    where: dict[str, list[str]],
) -> RankGroup:
    recovery = begin if isinstance(begin, Recovery) else None
    before: tuple[Any, ...] | None = None
    if isinstance(begin, Start):
        before = ("start", begin.origins) if begin.origins else None
    elif begin.ranks is not None:
        before = ("restore", checkpoints(folder), begin.ranks)
    ranks = await RankGroup.form(
        client,
        Rank(experiment.network, experiment.strategy, experiment.trainer, folder.identity),
        where[TRAINER][: experiment.ranks_range[1]],
        meeting=MeetingPoint(str(urlsplit(where[RUNNER][0]).hostname)),
        emit=emit,
        generation=0 if recovery is None else recovery.campaign.generation + 1,
        before=before,
    )
    if recovery is not None:
        # What descends from a version that was left since then would bring its faults back.
        verb = ranks.go_back if before is None or recovery.rolled_back else ranks.serve
        await answered(lambda: verb(folder.models, recovery.campaign.version))
    return ranks
