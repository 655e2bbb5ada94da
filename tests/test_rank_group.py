"""Laws of the group of ranks, with real processes: whenever ranks die, one change is told, and the others are alike."""

import asyncio
import os
import shutil
import signal

import pytest
import torch
from distributed import Client

from steering.campaign import GroupChanged
from steering.clusters import local
from steering.clusters.roles import TRAINER, addresses, workers_now
from steering.learning import MeetingPoint, Rank
from steering.learning.strategies import ER
from steering.models import ModelStore
from steering.records import ModelVersion
from steering.runner.actors import call, every
from steering.runner.rank_group import RankGroup
from tests.test_learning import labels, rank_of

pytestmark = pytest.mark.slow


class Mortal(Rank):
    """A rank that kills its process in the midst of a verb, once, where a file says so."""

    def __init__(self, folder, *arguments):
        super().__init__(*arguments)
        self.folder = folder

    async def keys(self):
        return sorted(self.buffer.state().key.tolist())

    def _due(self, verb):
        order = self.folder / f"{verb}-{self.rank}"
        if order.exists():
            order.unlink()
            return True
        return False

    def fit(self, scan, steps):
        if self._due("fit"):
            super().fit(scan, 3)  # the others go on to the fourth step
            os.kill(os.getpid(), signal.SIGKILL)
        self.hungry = self._due("memory")
        return super().fit(scan, steps)

    def _begin(self, scan):
        if self.hungry:
            torch.empty(2**50)
        super()._begin(scan)

    def publish(self, store, version):
        super().publish(store, version)
        if self._due("publish"):
            os.kill(os.getpid(), signal.SIGKILL)

    def go_back(self, store, number):
        super().go_back(store, number)
        if self._due("go_back"):
            os.kill(os.getpid(), signal.SIGKILL)

    def serve(self, store, number):
        super().serve(store, number)
        if self._due("serve"):
            os.kill(os.getpid(), signal.SIGKILL)

    async def receive(self, labels):
        if self._due("receive"):
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().receive(labels)


class Bench:
    """A group on a cluster of its own, and what the runner would do with it."""

    def __init__(self, client, folder):
        self.client, self.folder, self.store = client, folder, folder / "models"
        self.rank = rank_of(ER, deadline=60.0)
        self.told = []

    async def form(self, ranks):
        rank = Mortal(self.folder, self.rank.network, self.rank.strategy, self.rank.settings)
        self.group = await RankGroup.form(
            self.client,
            rank,
            addresses(await workers_now(self.client), TRAINER)[:ranks],
            meeting=MeetingPoint(),
            emit=self.told.append,
        )
        await self.teach()

    async def teach(self):
        assert await self.send_labels() is None

    async def send_labels(self):
        found = labels(n=60)

        async def send(ranks):
            await every(
                call(rank, "receive", found.share(k, len(ranks), self.group.generation)) for k, rank in enumerate(ranks)
            )

        return await self.group.send(send, self.group.generation)

    def let_die(self, verb, *ranks):
        for rank in ranks:
            (self.folder / f"{verb}-{rank}").touch()

    def version(self, number):
        hyperparameters = self.rank.network.hyperparameters
        return ModelVersion(number=number, network="ProbeFirst", hyperparameters=hyperparameters)

    async def sound(self):
        """After ten more steps all ranks have the same weights, optimiser state and step, and somebody judges."""
        await self.teach()  # as the campaign does after each change
        rounds = await self.group.fit("a", 10, self.group.generation)
        assert rounds[0].error is not None
        assert len(set(await self.group.digest())) == 1
        self.stored = [one.stored for one in rounds]
        keys = await self.keys()
        assert len(set(keys)) == len(keys)
        return rounds[0].steps

    async def keys(self):
        """Of all stored samples, whichever rank has them."""
        found = []
        assert await self.group.send(lambda ranks: self._keys(ranks, found), self.group.generation) is None
        return sorted(found)

    async def _keys(self, ranks, found):
        for keys in await every(call(rank, "keys") for rank in ranks):
            found.extend(keys)

    async def back(self, ranks):
        """The workers that were started again take part again."""
        while len(free := set(addresses(await workers_now(self.client), TRAINER)) - set(self.group.addresses)) < ranks:
            await asyncio.sleep(0.1)
        return await self.group.admit(sorted(free))


async def lives(client, folder):
    bench = Bench(client, folder)
    await bench.form(4)
    assert await bench.sound() == 10

    # Two of four at once, in the midst of a round; whoever else asks meanwhile hears of the same change.
    bench.let_die("fit", 0, 2)
    change, other = await asyncio.gather(
        bench.group.fit("a", 200, 0), bench.group.send(lambda ranks: asyncio.sleep(600), 0)
    )
    assert isinstance(change, GroupChanged)
    assert other is change
    assert bench.told == [change]
    assert (change.lost, change.joined, change.ranks) == ((0, 2), (), 2)
    assert await bench.group.fit("a", 5, 0) is change  # asked of the group before: not a step more
    assert await bench.sound() > 10

    joined = await bench.back(2)
    assert (joined.lost, joined.joined, joined.ranks) == ((), (2, 3), 4)
    await bench.sound()

    # Rank 0 as soon as the version is written: it is there once, and the others are held against it. What it stored
    # comes back from the checkpoint.
    stored = bench.stored
    await bench.group.checkpoint(folder / "checkpoints")
    bench.let_die("publish", 0)
    digests = set(await bench.group.digest())
    change = await bench.group.publish(bench.store, bench.version(1))
    assert isinstance(change, GroupChanged)
    assert change.lost == (0,)
    assert await bench.group.publish(bench.store, bench.version(1)) is None
    assert set(await bench.group.digest()) == digests
    assert ModelStore(bench.store).newest() == 1
    assert stored[0] > 0
    assert (change.samples_back, change.samples_lost) == (stored[0], 0)
    await bench.sound()
    assert sum(bench.stored) >= sum(stored)

    # One of three has gone back, the others perhaps: all do when it is asked again. Its share cannot be read.
    stored = bench.stored
    shutil.rmtree(folder / "checkpoints")
    bench.let_die("go_back", 1)
    change = await bench.group.go_back(bench.store, 1)
    assert isinstance(change, GroupChanged)
    assert change.lost == (1,)
    assert (change.samples_back, change.samples_lost) == (0, stored[1])
    assert await bench.group.go_back(bench.store, 1) is None
    assert len(set(await bench.group.digest())) == 1
    await bench.sound()
    assert len(bench.told) == 4

    # One of four while labels are sent, then one of four that has just taken up the version to judge against: what is
    # sent and served again leaves the others alike.
    assert (await bench.back(2)).ranks == 4
    bench.let_die("receive", 3)
    change = await bench.send_labels()
    assert isinstance(change, GroupChanged)
    assert change.lost == (3,)
    await bench.sound()
    assert (await bench.back(1)).ranks == 4
    bench.let_die("serve", 1)
    change = await bench.group.serve(bench.store, 1)
    assert isinstance(change, GroupChanged)
    assert change.lost == (1,)
    assert await bench.group.serve(bench.store, 1) is None
    await bench.sound()
    assert len(bench.told) == 8

    # One whose worker is about to end leaves what it remembers to one that has just joined.
    assert (await bench.back(1)).ranks == 4
    kept, digests, leaving = await bench.keys(), set(await bench.group.digest()), bench.group.addresses[0]
    change = await bench.group.retire([leaving], bench.folder)
    assert (change.lost, change.retired, change.samples_lost) == ((0,), (0,), 0)
    assert leaving not in bench.group.addresses
    assert await bench.keys() == kept
    assert set(await bench.group.digest()) == digests
    await bench.sound()
    assert await bench.group.retire([leaving], bench.folder) is None  # it has left
    assert await bench.group.retire(bench.group.addresses, bench.folder) is None  # nobody would be left

    # One that finds no memory is given up: its process ends, and the others go on.
    bench.let_die("memory", 1)
    hungry = bench.group.addresses[1]
    change = await bench.group.fit("a", 20, bench.group.generation)
    assert isinstance(change, GroupChanged)
    assert change.lost == (1,)
    assert hungry not in await workers_now(client)
    await bench.sound()

    # An error of one's own is no loss.
    with pytest.raises(FileExistsError, match="model version 1"):
        await bench.group.publish(bench.store, bench.version(1))
    await bench.group.close()


def test_whenever_ranks_die_one_change_is_told_and_the_others_are_alike(tmp_path):
    async def main(address):
        async with Client(address, asynchronous=True) as client:
            await asyncio.wait_for(lives(client, tmp_path), 300)

    with local(ranks=4) as client:
        asyncio.run(main(client.scheduler.address))
