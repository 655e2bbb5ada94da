"""The actors of a run: where each is placed, and from what each begins or goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from distributed import Client

from steering.campaign import Event, Publish
from steering.clusters.roles import INFERENCE, ROLES, RUNNER, SOURCE, TRAINER, addresses, missing, refusal, workers_now
from steering.inference import Predictor
from steering.learning import MeetingPoint, Rank
from steering.models import ModelStore
from steering.records import ModelVersion
from steering.runner.actors import ActorHandle, call, place
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.manifest import checkpoints
from steering.runner.predictor_proxy import PredictorProxy
from steering.runner.rank_group import RankGroup, answered
from steering.runner.recovery import Recovery, clean_store
from steering.runner.source_actor import SourceActor


@dataclass(frozen=True, kw_only=True)
class Actors:
    """All that a run has placed on the cluster."""

    source: ActorHandle
    proxy: PredictorProxy
    ranks: RankGroup


async def assemble(
    client: Client, experiment: Experiment, folder: RunFolder, emit: Callable[[Event], None], recovery: Recovery | None
) -> Actors:
    """Start source, predictor and ranks. recovery: what they go on from; None: a run begins.

    Raises RuntimeError where the cluster lacks a role.
    """
    workers = await workers_now(client)
    lacks = missing(workers, ranks=experiment.ranks or 1)
    if lacks:
        raise RuntimeError(refusal(len(workers), client.scheduler.address, lacks))
    where = {role: addresses(workers, role) for role in ROLES}
    await asyncio.to_thread(_ready_store, ModelStore(folder.models), experiment, recovery)
    spool = checkpoints(folder) / "spool" if experiment.spool else None
    actor = SourceActor(experiment.source, keep_bytes=experiment.prediction.keep_bytes, spool=spool)
    source = await place(client, actor, worker=where[SOURCE][0])
    predictor = _predictor(experiment, folder)
    handle = await place(client, predictor, worker=where[INFERENCE][0])
    base = None if recovery is None else recovery.predictor
    proxy = PredictorProxy(client, predictor, handle, source.actor, emit=emit, base=base)
    forming = _ranks(client, experiment, folder, emit, recovery, where)
    ranks, _ = await asyncio.gather(forming, proxy.start())
    await call(source.actor, "start", proxy.actor, None if recovery is None else recovery.source)
    return Actors(source=source, proxy=proxy, ranks=ranks)


async def _ranks(
    client: Client,
    experiment: Experiment,
    folder: RunFolder,
    emit: Callable[[Event], None],
    recovery: Recovery | None,
    where: dict[str, list[str]],
) -> RankGroup:
    part = None if recovery is None or recovery.ranks is None else (checkpoints(folder), recovery.ranks)
    ranks = await RankGroup.form(
        client,
        Rank(experiment.network, experiment.strategy, experiment.trainer),
        where[TRAINER][: experiment.ranks],
        meeting=MeetingPoint(str(urlsplit(where[RUNNER][0]).hostname)),
        emit=emit,
        generation=0 if recovery is None else recovery.campaign.generation + 1,
        restore=part,
    )
    if recovery is not None:
        # What descends from a version that was left since then would bring its faults back.
        verb = ranks.go_back if part is None or recovery.rolled_back else ranks.serve
        await answered(lambda: verb(folder.models, recovery.campaign.version))
    return ranks


def _ready_store(store: ModelStore, experiment: Experiment, recovery: Recovery | None) -> None:
    """The untrained network as version 0, or what the campaign that goes on knows of."""
    network = experiment.network
    network.optics.set(experiment.source.probe, ~experiment.source.geometry.good())
    if recovery is not None:
        clean_store(store, recovery.campaign, [a.version for a in recovery.open if isinstance(a, Publish)])
        return
    hyperparameters = dict(network.hyperparameters)
    store.publish(
        network, ModelVersion(number=0, network=type(network).__name__, hyperparameters=hyperparameters, parents=())
    )


def _predictor(experiment: Experiment, folder: RunFolder) -> Predictor:
    source = experiment.source
    return Predictor(
        field=source.field,
        geometry=source.geometry,
        probe=source.probe,
        policy=experiment.policy,
        store=folder.models,
        hold_out=experiment.hold_out,
        truths=experiment.truths(),
        settings=experiment.prediction,
        network=type(experiment.network),
        frame_rate=source.frame_rate,
    )
