"""The actors of a run, each on a worker that carries its role."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from distributed import Client

from steering.inference import Predictor
from steering.learning import MeetingPoint, Rank
from steering.runner.beamline import Beamline
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder


@dataclass
class Crew:
    """Handles of the actors, and what must live as long as they do."""

    source: Any
    predictor: Any
    ranks: list[Any]
    """In the order of their ranks."""
    homes: list[str]
    """Address of the worker of each rank."""
    meeting: MeetingPoint
    generation: int = 0
    _held: list[Any] = field(default_factory=list)

    @classmethod
    async def assemble(cls, client: Client, experiment: Experiment, folder: RunFolder) -> Crew:
        """Start source, predictor and ranks. Raises RuntimeError where the cluster lacks a role."""
        workers = await _roles(client)
        source = experiment.source
        predictor = Predictor(
            field=source.field,
            geometry=source.geometry,
            probe=source.probe,
            policy=experiment.policy,
            store=folder.models,
            hold_out=experiment.hold_out,
            truths=experiment.truths(),
            settings=experiment.prediction,
        )
        rank = Rank(experiment.network, experiment.strategy, experiment.trainer)
        if len(workers["trainer"]) < experiment.ranks:
            raise RuntimeError(
                f"found {len(workers['trainer'])} workers with the resource trainer, expected {experiment.ranks}: "
                "start the cluster with as many ranks as the experiment has"
            )
        futures = [
            await _actor(client, Beamline(source), worker=workers["source"][0]),
            await _actor(client, predictor, worker=workers["inference"][0]),
        ]
        homes = workers["trainer"][: experiment.ranks]
        futures += [await _actor(client, rank, worker=home) for home in homes]
        actors = await asyncio.gather(*futures)
        meeting = MeetingPoint(str(urlsplit(workers["runner"][0]).hostname))
        crew = cls(actors[0], actors[1], list(actors[2:]), homes, meeting, _held=futures)
        await crew.predictor.start()
        await crew.source.start(crew.predictor)
        await crew._join()
        return crew

    async def lost(self, client: Client) -> list[int]:
        """Ranks whose worker is gone; where none is, the scheduler gets a few seconds to notice."""
        for _ in range(50):
            known = await client.scheduler.identity(n_workers=-1)
            gone = [rank for rank, home in enumerate(self.homes) if home not in known["workers"]]
            if gone:
                return gone
            await asyncio.sleep(0.1)
        return []

    async def re_form(self, lost: list[int]) -> None:
        """Form the group anew from the ranks that are left; each keeps its weights, samples and buffer."""
        kept = [rank for rank in range(len(self.ranks)) if rank not in lost]
        self.ranks, self.homes = [self.ranks[r] for r in kept], [self.homes[r] for r in kept]
        self.generation += 1
        await self._join()

    async def _join(self) -> None:
        where, ranks = self.meeting.rendezvous, len(self.ranks)
        joins = (
            asked(rank, "join", where, rank=number, ranks=ranks, generation=self.generation)
            for number, rank in enumerate(self.ranks)
        )
        await asyncio.gather(*joins)

    async def close(self) -> None:
        """Let the source end and the ranks leave their group."""
        for actor in (self.source, *self.ranks):
            try:
                await asyncio.wait_for(asked(actor, "close"), 5)
            except Exception:  # noqa: S112 - what is gone already needs no closing
                continue


async def _roles(client: Client) -> dict[str, list[str]]:
    """Worker addresses by role."""
    known = await client.scheduler.identity(n_workers=-1)
    roles: dict[str, list[str]] = {name: [] for name in ("source", "inference", "trainer", "label", "runner")}
    for address, worker in sorted(known["workers"].items(), key=lambda item: str(item[1]["name"])):
        for role in worker["resources"]:
            roles.setdefault(role, []).append(address)
    missing = [role for role, found in roles.items() if not found]
    if missing:
        raise RuntimeError(
            f"found no worker with the resource {' or '.join(missing)}; expected one for each role: start workers with "
            f'--resources, as in: dask worker {client.scheduler.address} --resources "{missing[0]}=1"'
        )
    return roles


async def _actor(client: Client, thing: Any, *, worker: str) -> Any:
    """A future of an actor made of `thing` on a worker. What it weighs goes there directly, past the scheduler."""
    [there] = await client.scatter([thing], workers=[worker], hash=False, direct=True)
    return client.submit(_same, there, actor=True, workers=[worker], pure=False, allow_other_workers=False)


def _same(thing: Any) -> Any:
    return thing


async def asked(actor: Any, method: str, *arguments: Any, **named: Any) -> Any:
    """The answer of an actor. Where its worker is known to be gone, already the name of the method raises: here that
    is an answer like any other."""
    return await getattr(actor, method)(*arguments, **named)
