"""The actors of a run, each on a worker that carries its role."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from distributed import Client

from steering.inference import Predictor, ResumeState
from steering.learning import MeetingPoint, Rank
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.source_actor import SourceActor

_LOOK_S = 1.0
"""Between two looks whether a worker is still there."""
_RESTART_S = 120.0
"""How long a worker may take to be there again: importing torch from a slow disk needs a minute."""


@dataclass(kw_only=True)
class Actors:
    """Handles of the actors, and what must live as long as they do."""

    experiment: Experiment
    folder: RunFolder
    source: Any
    predictor: Any
    predictor_address: str
    """Address of its worker."""
    predictor_future: Any
    ranks: list[Any]
    """In the order of their ranks."""
    addresses: list[str]
    """Address of the worker of each rank."""
    meeting: MeetingPoint
    generation: int = 0
    """Of the group of ranks."""
    predictor_number: int = 0
    """How many predictors were lost before this one."""
    _held: list[Any] = field(default_factory=list)

    @classmethod
    async def assemble(cls, client: Client, experiment: Experiment, folder: RunFolder) -> Actors:
        """Start source, predictor and ranks. Raises RuntimeError where the cluster lacks a role."""
        workers = await _roles(client)
        rank = Rank(experiment.network, experiment.strategy, experiment.trainer)
        if len(workers["trainer"]) < experiment.ranks:
            raise RuntimeError(
                f"found {len(workers['trainer'])} workers with the resource trainer, expected {experiment.ranks}: "
                "start the cluster with as many ranks as the experiment has"
            )
        beamline = SourceActor(experiment.source, keep_bytes=experiment.prediction.keep_bytes)
        home = workers["inference"][0]
        futures = [
            await _actor(client, _predictor(experiment, folder), worker=home),
            await _actor(client, beamline, worker=workers["source"][0]),
        ]
        addresses = workers["trainer"][: experiment.ranks]
        futures += [await _actor(client, rank, worker=home) for home in addresses]
        predictor, source, *ranks = await asyncio.gather(*futures)
        actors = cls(
            experiment=experiment,
            folder=folder,
            source=source,
            predictor=predictor,
            predictor_address=home,
            predictor_future=futures[0],
            ranks=ranks,
            addresses=addresses,
            meeting=MeetingPoint(str(urlsplit(workers["runner"][0]).hostname)),
            _held=futures[1:],
        )
        await actors.predictor.start()
        await actors.source.start(actors.predictor)
        await actors._join()
        return actors

    async def lost_ranks(self, client: Client) -> list[int]:
        """Ranks whose worker is gone; where none is, the scheduler gets a few seconds to notice."""
        gone = await _gone(client, self.addresses)
        return [rank for rank, home in enumerate(self.addresses) if home in gone]

    async def predictor_lost(self, client: Client) -> bool:
        """Whether the predictor's worker is gone, in the same way. Where one was started again at the same address, the
        predictor's future tells so."""
        there = ("pending", "finished")
        if self.predictor_future.status not in there or await _gone(client, [self.predictor_address]):
            return True
        return self.predictor_future.status not in there

    async def replace_predictor(self, client: Client, resume: ResumeState) -> int:
        """Start another predictor, and have the source send it the frames. Returns how many it was sent again.

        Raises RuntimeError where no worker has room for it in time, and what an actor raises whose worker is lost.
        """
        self.predictor_address = home = await _address_of(client, "inference")
        work = asyncio.ensure_future(self._begin_another(client, resume))
        try:
            # What is asked of a worker that dies before the actor is there is never answered.
            while not work.done():
                await asyncio.wait({work}, timeout=_LOOK_S)
                if home not in (await client.scheduler.identity(n_workers=-1))["workers"]:
                    raise OSError(f"found the worker at {home} gone, expected it to take the predictor")
            return work.result()
        finally:
            work.cancel()

    async def _begin_another(self, client: Client, resume: ResumeState) -> int:
        self.predictor_future = await _actor(
            client, _predictor(self.experiment, self.folder), worker=self.predictor_address
        )
        predictor = await self.predictor_future
        await call(predictor, "start", resume)
        frames: int = await call(self.source, "go_on_with", predictor, self.predictor_number + 1)
        self.predictor = predictor
        self.predictor_number += 1
        return frames

    async def re_form(self, lost: list[int]) -> None:
        """Form the group anew from the ranks that are left; each keeps its weights, samples and buffer."""
        kept = [rank for rank in range(len(self.ranks)) if rank not in lost]
        self.ranks, self.addresses = [self.ranks[r] for r in kept], [self.addresses[r] for r in kept]
        self.generation += 1
        await self._join()

    async def _join(self) -> None:
        where, ranks = self.meeting.rendezvous, len(self.ranks)
        joins = (
            call(rank, "join", where, rank=number, ranks=ranks, generation=self.generation)
            for number, rank in enumerate(self.ranks)
        )
        await asyncio.gather(*joins)

    async def close(self) -> None:
        """Let the source end and the ranks leave their group."""
        for actor in (self.source, *self.ranks):
            try:
                await asyncio.wait_for(call(actor, "close"), 5)
            except Exception:  # noqa: S112 - what is gone already needs no closing
                continue


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
        frame_rate=source.frame_rate,
    )


async def _gone(client: Client, addresses: list[str]) -> set[str]:
    for _ in range(50):
        known = await client.scheduler.identity(n_workers=-1)
        gone = set(addresses) - set(known["workers"])
        if gone:
            return gone
        await asyncio.sleep(0.1)
    return set()


async def _address_of(client: Client, role: str) -> str:
    """Address of a worker of that role, when there is one again: who watches over the lost one starts another."""
    for _ in range(int(_RESTART_S / 0.2)):
        known = (await client.scheduler.identity(n_workers=-1))["workers"]
        addresses = sorted(address for address, worker in known.items() if role in worker["resources"])
        if addresses:
            return addresses[0]
        await asyncio.sleep(0.2)
    raise RuntimeError(
        f"found no worker with the resource {role} within {_RESTART_S:.0f} s of the loss of one, expected another: "
        f'start workers under a nanny, or a second one with --resources "{role}=1"'
    )


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


async def call(actor: Any, method: str, *arguments: Any, **named: Any) -> Any:
    """The answer of an actor. Where its worker is known to be gone, already the name of the method raises: here that
    is an answer like any other."""
    return await getattr(actor, method)(*arguments, **named)


def _same(thing: Any) -> Any:
    return thing
