"""The group of training ranks: the one place that knows who they are, where they are, and in which generation."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from distributed import Client

from steering.campaign import GroupChanged
from steering.learning import GroupLost, MeetingPoint, NoSamples, Rank, RanksPart, Round, joined, newest_number
from steering.runner.actors import (
    LOOK_S,
    ActorHandle,
    CallsFailed,
    LostForGood,
    call,
    every,
    gone,
    losses,
    place,
    release,
    retrieved,
    set_free,
    while_all_there,
    while_there,
)
from steering.runner.rank_verbs import RankVerbs
from steering.runner.shares import Shares
from steering.runner.watch import given_up

_ATTEMPTS = 5
"""Groups that are tried one after the other when each loses ranks while it forms."""
_ALONE_S = 5.0
"""How long ranks that are ready to join wait for a first round of those who are left after a loss."""
_STARVED = 3
"""Ranks that may find no memory, one after the other, before a round is whole again."""
_READY_S = 300.0
"""How long a new rank may take to be ready to join: importing torch from a slow disk needs a minute."""

T = TypeVar("T")


class RankGroup(RankVerbs):
    """Asks the ranks, whoever they are by now. A verb returns their answer, or, where ranks were lost, what the group
    has become in their place; it never does both.

    One change of the group is one GroupChanged, emitted once and returned by every verb that it interrupted, however
    many ranks are lost and however many verbs notice. What a verb is interrupted in has happened in part or not at all;
    each may be asked again. Verbs in which all ranks take part come one at a time, in the order in which they are
    asked.
    """

    def __init__(
        self, client: Client, rank: Rank, meeting: MeetingPoint, *, emit: Callable[[GroupChanged], None]
    ) -> None:
        """rank: the description that every rank is made of. meeting: kept as long as the group lives. emit: where
        changes go. Use `form`."""
        self.generation = 0
        self._client = client
        self._rank = rank
        self._meeting = meeting
        self._emit = emit
        self._members: list[ActorHandle] = []
        """In the order of their ranks."""
        self._joining: list[ActorHandle] = []
        """Ready, and on their way into the group."""
        self._numbers: dict[ActorHandle, int] = {}
        """Of each rank, a number that no other has as long as it lives."""
        self._began = 0
        """Ranks of the first group."""
        self._stored: dict[ActorHandle, int] = {}
        """Samples in each rank's buffer, as it reported them last."""
        self._starved = 0
        """Ranks that have found no memory since the last whole round."""
        self._trains = asyncio.Event()
        """Not set between a loss and the next whole round."""
        self._trains.set()
        self._shares = Shares(client)
        self._change: GroupChanged | None = None
        """The newest."""
        self._turn = asyncio.Lock()
        """Held by the verb in which all ranks take part."""
        self._recording = asyncio.Lock()
        """Held while a checkpoint is made."""
        self._number = 0
        """Of the newest checkpoint."""
        self._changing = asyncio.Lock()
        """Held while the group forms anew."""

    @classmethod
    async def form(
        cls,
        client: Client,
        rank: Rank,
        addresses: Sequence[str],
        *,
        meeting: MeetingPoint,
        emit: Callable[[GroupChanged], None],
        generation: int = 0,
        before: tuple[Any, ...] | None = None,
    ) -> RankGroup:
        """The first group: a rank on each of these workers. Raises what a rank raises.

        generation: its number. before: a verb of the rank with its arguments, asked of each before the group forms:
        `("restore", folder, part)` for the ranks' part of a checkpoint, written by any number of ranks; `("start",
        origins)` for earlier runs.
        """
        group = cls(client, rank, meeting, emit=emit)
        group.generation = generation
        group._members = await group._ready(addresses)
        group._began = ranks = len(addresses)
        if before is not None and before[0] == "restore":  # the rate and batch of a rank follow from both numbers
            group._began = before[2].began or before[2].ranks
        try:
            if before is not None:
                await every(
                    call(member.actor, *before, rank=number, ranks=ranks)
                    for number, member in enumerate(group._members)
                )
                if before[0] == "restore" and before[2].ranks == ranks:
                    group._shares.written(before[1], before[2], group._members)
            await group._join(group._members)
        except CallsFailed as failed:
            raise await failed.cause() from None
        return group

    def __len__(self) -> int:
        return len(self._members)

    @property
    def addresses(self) -> list[str]:
        """Of the workers of the ranks, in the order of the ranks; behind them those that are ready to join."""
        return [member.address for member in (*self._members, *self._joining)]

    async def fit(self, scan: str, steps: int, generation: int) -> list[Round] | GroupChanged:
        """A training round of all ranks of a generation; what each says of it, in the order of the ranks."""

        async def work(ranks: list[Any]) -> list[Round]:
            return await every(call(rank, "fit", scan, steps) for rank in ranks)

        rounds = await self._together(work, generation)
        if not isinstance(rounds, GroupChanged):
            self._starved = 0
            self._trains.set()
            self._stored = {m: one.stored for m, one in zip(self._members, rounds, strict=False)}
        return rounds

    async def send(self, work: Callable[[list[Any]], Awaitable[T]], generation: int) -> T | GroupChanged:
        """Work that sends something to the ranks of a generation, also while they train: `work(ranks)`, their actors.

        Where the group changes meanwhile the answer is the change, also if the work was done: part of what was sent is
        lost.
        """
        return await self._ask(work, generation)

    async def checkpoint(self, folder: Path, number: int | None = None) -> RanksPart | GroupChanged:
        """Write what the ranks hold, all of them as after the same step, into a folder that all can write.

        Ranks wait for their turn only while they make their cuts, some milliseconds between two rounds; they train on
        while the files are written. Returns when these are on the disk. Where the group changes meanwhile there is no
        checkpoint, and the answer is the change. Numbers rise, also after one that failed; None: the next one.
        Checkpoints come one at a time. The part names what to keep, see `prune`.

        Raises OSError where a rank cannot write, and Overrun where its disk is slower than the inserts: nothing else is
        lost by that, and the next one may succeed.
        """
        async with self._recording:
            return await self._record(number, folder, self._turn)

    async def _record(self, number: int | None, folder: Path, turn: Any) -> RanksPart | GroupChanged:
        """turn: held while the cuts are made."""
        if number is None:  # ranks that a lost runner has left may be writing the one after the newest
            number = 1 + (self._number or 1 + await asyncio.to_thread(newest_number, folder))
        self._number = max(number, self._number)

        async def cut(ranks: list[Any]) -> tuple[int, list[ActorHandle]]:
            mine = self.generation, self._members
            await every(call(rank, "cut", folder, number) for rank in ranks)
            return mine

        idle = await self._ask(lambda ranks: every(call(rank, "recorded") for rank in ranks), None)
        if isinstance(idle, GroupChanged):
            return idle
        async with turn:
            begun = await self._ask(cut, None)
        if isinstance(begun, GroupChanged):
            return begun
        generation, members = begun
        files = await self._ask(lambda ranks: every(call(rank, "written") for rank in ranks), generation)
        if isinstance(files, GroupChanged):
            return files
        part = replace(joined(number, files), began=self._began)
        self._shares.written(folder, part, members)
        return part

    async def admit(self, addresses: Sequence[str]) -> GroupChanged:
        """Let new ranks join, one on each of these workers, between two verbs: they take over weights, optimiser, step
        and held-out samples, and their share of the samples to train on.

        Of the stored samples none is moved. Draws are uniform over all stored samples whatever the fills of the ranks,
        so the empty buffer of a new rank is no flaw: its room takes what is measured from now on, until it is full.

        Meanwhile the others train: a new rank imports and starts up before it joins. Raises OSError where a worker is
        lost before its rank is ready, TimeoutError where it takes too long; the group stays as it was.
        """
        joining = await asyncio.wait_for(self._ready(addresses), _READY_S)
        self._joining += joining
        try:
            with contextlib.suppress(TimeoutError):  # a change would void that round, and training be later again
                await asyncio.wait_for(self._trains.wait(), _ALONE_S)
            async with self._turn:
                begun = time.perf_counter()
                async with self._changing:
                    try:
                        return await self._form_anew([], joining, begun)
                    except LostForGood:
                        raise
                    except Exception:  # of a new one: the others go on without it
                        await self._form_anew([], [], begun)
                        raise
        finally:
            self._joining = [member for member in self._joining if member not in joining]

    async def retire(self, addresses: Sequence[str], folder: Path) -> GroupChanged | None:
        """Let the ranks on these workers, which are about to end, leave in order between two verbs: what they remember
        goes to ranks that have just joined, else to all others, by files of a checkpoint in `folder`.

        None where nobody else would be left, or none of them is there. Raises OSError where the files cannot be
        written; the group stays as it was.
        """
        async with self._recording:
            leaving = [member for member in self._members if member.address in addresses]
            if len(leaving) in (0, len(self._members)):
                return None
            async with self._turn:
                begun = time.perf_counter()
                part = await self._record(None, folder, contextlib.nullcontext())
                if isinstance(part, GroupChanged):
                    return part
                async with self._changing:
                    change = await self._form_anew(leaving, [], begun, retired=leaving)
        await asyncio.gather(*(release(self._client, member, "close") for member in leaving))
        return change

    async def close(self) -> None:
        """Let the ranks leave their group, and let go of them."""
        members, self._members = self._members, []
        await asyncio.gather(*(release(self._client, member, "close") for member in members))

    async def _together(
        self, work: Callable[[list[Any]], Awaitable[T]], generation: int | None = None
    ) -> T | GroupChanged:
        async with self._turn:
            return await self._ask(work, generation)

    async def _ask(self, work: Callable[[list[Any]], Awaitable[T]], generation: int | None) -> T | GroupChanged:
        async with self._changing:
            members, mine = self._members, self.generation
        if generation is not None and generation != mine and self._change is not None:
            return self._change
        job = asyncio.ensure_future(work([member.actor for member in members]))
        job.add_done_callback(retrieved)
        try:
            error: Exception | None = None
            while not job.done():
                await asyncio.wait({job}, timeout=LOOK_S)
                if self.generation != mine:
                    break
                if not job.done() and await gone(self._client, members):
                    break  # what is asked of it may never be answered
            if self.generation == mine and job.done():
                try:
                    return job.result()
                except Exception as failed:
                    error = failed
            return await self._repaired(mine, error)
        finally:
            job.cancel()

    async def _ready(self, addresses: Sequence[str]) -> list[ActorHandle]:
        """New ranks on these workers, that need nothing but a group any more."""
        found = list(await asyncio.gather(*(place(self._client, self._rank, worker=where) for where in addresses)))
        self._numbers = {
            one: number for one, number in self._numbers.items() if one in (*self._members, *self._joining)
        }
        free = (number for number in count() if number not in self._numbers.values())
        self._numbers |= dict(zip(found, free, strict=False))
        calls = (
            while_there(self._client, one.address, call(one.actor, "prepare", self._numbers[one])) for one in found
        )
        await asyncio.gather(*calls)
        return found

    async def _repaired(self, generation: int, error: Exception | None) -> GroupChanged:
        """What the group of this generation has become. Raises the error where nobody is lost and the group is whole.

        error: what was raised; None: nothing yet.
        """
        members, begun = self._members, time.perf_counter()
        if isinstance(error, CallsFailed) and isinstance(error.first, NoSamples):
            raise error.first  # all ranks have agreed on it: nobody is lost
        # Nobody else has to wait while this is found out: some errors are no losses.
        lost = await losses(self._client, members) if self.generation == generation else []
        async with self._changing:
            if self.generation != generation and self._change is not None:
                return self._change
            if not lost and error is not None:
                cause = await error.cause() if isinstance(error, CallsFailed) else error
                if self._starved < _STARVED:
                    lost = await given_up(self._client, members, cause)
                    self._starved += len(lost)
                if not lost and not isinstance(cause, GroupLost):
                    raise cause
            return await self._form_anew(lost, [], begun)

    async def _form_anew(
        self,
        lost: list[ActorHandle],
        joining: list[ActorHandle],
        begun: float,
        retired: Sequence[ActorHandle] = (),
    ) -> GroupChanged:
        """Form a group of those who are left and those who join; more may be lost meanwhile. begun: when that was due,
        by time.perf_counter. retired: those of the lost ones who have handed over what they had."""
        before, attempts, back = self._members, 0, 0
        while True:
            kept = [member for member in before if member not in lost]
            new = [member for member in joining if member not in lost]
            if not kept:
                raise LostForGood(
                    f"found all {len(before)} training ranks lost, expected one that is left: look at the logs of the "
                    "workers with the resource trainer, and at their memory"
                )
            attempts += 1
            self.generation += 1
            if lost:
                self._trains.clear()
                await set_free([member.actor for member in kept])
                empty = [member for member in kept if not self._stored.get(member)] if retired else []
                back += await self._shares.taken_over(lost, empty or kept)
            try:
                await self._join([*kept, *new])
                break
            except (CallsFailed, OSError) as failed:
                more = await losses(self._client, [*kept, *new])
                lost = [*lost, *more]
                cause = await failed.cause() if isinstance(failed, CallsFailed) and not more else failed
                if attempts == _ATTEMPTS or not (more or isinstance(cause, GroupLost | RuntimeError)):
                    raise cause from None
        self._members = [*kept, *new]
        self._change = GroupChanged(
            time=time.time(),
            lost=tuple(number for number, member in enumerate(before) if member in lost),
            joined=tuple(range(len(kept), len(self._members))),
            ranks=len(self._members),
            generation=self.generation,
            seconds=time.perf_counter() - begun,
            retired=tuple(number for number, member in enumerate(before) if member in retired),
            samples_lost=max(0, sum(self._stored.get(member, 0) for member in before if member in lost) - back),
            samples_back=back,
        )
        self._emit(self._change)
        return self._change

    async def _join(self, members: list[ActorHandle]) -> None:
        """Have these ranks form the group of this generation. Raises OSError where one is lost before all are there."""
        where, ranks = self._meeting.rendezvous, len(members)
        calls = (
            call(member.actor, "join", where, rank=number, ranks=ranks, generation=self.generation, began=self._began)
            for number, member in enumerate(members)
        )
        await while_all_there(self._client, members, every(calls))
