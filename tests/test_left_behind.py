"""What a lost runner leaves on the workers of a cluster that goes on."""

import asyncio
import contextlib
import copy
import gc
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
from distributed import Client, LocalCluster, Scheduler, Worker

from steering.campaign import ChunkArrived, DecisionSuggested, SourceEnded, SourceReopened, SourceSilent, Steer
from steering.clusters.roles import SOURCE
from steering.inference import Predictor
from steering.learning.strategies import ER
from steering.models import ProbeFirst
from steering.ptychography import zone_plate
from steering.runner import RunFolder
from steering.runner.actors import call, place, release
from steering.runner.adoption import adopted, place_source, withdraw
from steering.runner.client import Handle
from steering.runner.source_actor import SourceActor
from steering.runner.source_events import GoOn, SourceResume, Standing, TakenOver
from steering.runner.source_known import SinceCheckpoint
from steering.runner.source_proxy import SourceProxy
from steering.sources import SimulatedBeamline, Stage, pacing
from tests.test_alone import Predictor as Takes
from tests.test_inference import predictor
from tests.test_runner import experiment
from tests.test_source_actor import beamline

QUIET = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}


@contextlib.asynccontextmanager
async def one_worker():
    """A cluster of one worker in this process, and what makes a client of it."""
    async with Scheduler(host="127.0.0.1", port=0, **QUIET) as scheduler, Worker(scheduler.address) as worker:
        yield worker, lambda: Client(scheduler.address, asynchronous=True)


async def forgotten(store):
    """What is left of the images of a predictor whose runner went without a word and left a call open, while another
    one goes on with its own; and the interval at which threads give up the interpreter meanwhile."""
    description = predictor(store)
    async with one_worker() as (worker, client):
        async with client() as runner:
            first = await place(runner, description, worker=worker.address)
            await call(first.actor, "start")
            [mine] = [one for one in worker.state.actors.values() if isinstance(one, Predictor)]
            images = weakref.ref(mine.scans)
            open_ = asyncio.ensure_future(call(first.actor, "events"))
            await asyncio.sleep(0.1)
            open_.cancel()
            del mine, first
        while any(isinstance(one, Predictor) for one in worker.state.actors.values()):
            await asyncio.sleep(0.05)
        async with client() as runner:
            second = await place(runner, description, worker=worker.address)
            await call(second.actor, "start")
            for _ in range(100):
                if images() is None:
                    break
                await asyncio.sleep(0.1)
                gc.collect()
            quick = sys.getswitchinterval()
            await call(second.actor, "close")
    return images(), quick


def test_a_predictor_whose_runner_is_lost_leaves_no_memory_behind(tmp_path):
    before = sys.getswitchinterval()
    left, quick = asyncio.run(asyncio.wait_for(forgotten(tmp_path / "models"), 60))
    assert left is None
    assert quick < 0.005, "the next one has what it has set, and not Python's own"
    assert sys.getswitchinterval() == before


async def heard_late(folder):
    """What the next runner is told of a source that it has adopted, of which the last one is heard once more: what that
    had sent while it had no network."""
    source = beamline("a")
    where = tuple(map(tuple, source.candidates[:4].tolist()))
    actor = SourceActor(source, folder=folder, unsteered_s=60.0, holder="last")
    await actor.start(Takes())
    position = await actor.asked("last", "position")
    steer = Steer(DecisionSuggested(time=0.0, positions=where, reasons=("why",) * 4), None, id=1)
    assert await actor.adopt(folder.identity, Takes(), SourceResume(position=position, decisions=(steer,)), "next")
    for words in (("events",), ("apply", steer), ("release",)):
        with pytest.raises(TakenOver):
            await actor.asked("last", *words)
    told = []
    while sum(len(event.frame_ids) for event in told) < 4:
        told += [event for event in await actor.asked("next", "events") if isinstance(event, ChunkArrived)]
    await actor.close()
    return told


def test_a_lost_runner_that_is_heard_late_takes_nothing_from_the_next_one(tmp_path):
    told = asyncio.run(asyncio.wait_for(heard_late(RunFolder.create(tmp_path / "run")), 60))
    assert sorted(i for event in told for i in event.frame_ids) == [0, 1, 2, 3]


async def ended_late(folder):
    """Where a source is after the runner that was lost has ended as runners do."""
    actor = SourceActor(beamline("a"), folder=folder, unsteered_s=60.0, holder="last")
    async with one_worker() as (worker, client), client() as runner, client() as follower:
        takes = await place(follower, Takes(), worker=worker.address)
        handle = await place_source(runner, actor, worker.address)
        await call(handle.actor, "start", takes.actor)
        position = await call(handle.actor, "position")
        mine = await adopted(follower, folder, takes.actor, SourceResume(position=position), "next")
        assert not await release(runner, handle, "asked", "last", "release")
        await runner.close()
        found = await call(mine.actor, "asked", "next", "position")
        assert await release(follower, mine, "asked", "next", "release")
        await withdraw(follower)
        return found


def test_a_lost_runner_that_ends_late_leaves_the_source_to_the_next_one(tmp_path):
    assert "source" in asyncio.run(asyncio.wait_for(ended_late(RunFolder.create(tmp_path / "run")), 60))


class Keeps(Takes):
    """Takes chunks, and keeps their counts by id."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    async def receive(self, chunk):
        await super().receive(chunk)
        self.counts.update(zip(chunk["frame"].values.tolist(), chunk["counts"].values, strict=True))


def steer(source, number):
    where = tuple(map(tuple, source.candidates[4 * number - 4 : 4 * number].tolist()))
    return Steer(DecisionSuggested(time=0.0, positions=where, reasons=("why",) * 4), None, id=number)


async def arrived(predictor, count):
    while len(predictor.counts) < count:
        await asyncio.sleep(0.01)


async def lost_one_after_the_other():
    """Counts that the first predictor has taken, and the second, which goes on from a checkpoint after four frames,
    after the source was lost at eight."""
    description, first, second = beamline("a"), Keeps(), Keeps()
    since = SinceCheckpoint(description.position())
    lost = SourceActor(copy.deepcopy(description))
    await lost.start(first)
    for number in (1, 2):
        since.steered(steer(description, number))
        await lost.apply(steer(description, number))
        await arrived(first, 4 * number)
        since.came(range(4 * number - 4, 4 * number))
        standing = [e for e in await lost.events() if isinstance(e, Standing)][-1]
        if number == 1:
            position = await lost.position()
            since.mark(position["source"], position["steered"], since.asked())
            since.commit()
    await lost.close()
    newest = GoOn(
        position=standing.position,
        applied=2,
        decisions=(),
        handed={"a": tuple(range(8))},
        arrived=frozenset(range(8)),
        scans={"a": "a"},
        known=2,
    )
    actor = SourceActor(copy.deepcopy(description))
    await actor.start(first, 0, since.instead_of(newest))
    await actor.apply(steer(description, 3))
    await arrived(first, 12)
    sent = await actor.go_on_with(second, 1)
    await actor.close()
    return first.counts, second.counts, sent


def test_what_a_lost_source_had_kept_since_the_checkpoint_the_next_one_gives_again():
    """Source and predictor are lost one after the other, with no checkpoint between them."""
    first, second, sent = asyncio.run(asyncio.wait_for(lost_one_after_the_other(), 60))
    assert sorted(first) == list(range(12))
    assert sorted(sent) == sorted(second) == list(range(4, 12))
    assert all(np.array_equal(second[i], first[i]) for i in second)


class Silent:
    """A worker that is there and gives no sign of life."""

    def __init__(self, address):
        self.address = address

    def silent(self, workers):
        return self.address in workers


def test_a_silent_runner_is_given_up_only_where_a_checkpoint_is_there_for_the_next_one(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    options = {"n_workers": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        [address] = client.scheduler_info()["workers"]
        handle = Handle(None, None, folder, client, Silent(address))
        (folder.path / "checkpoints" / "1").mkdir(parents=True)  # one that is being written
        assert not handle.lost
        assert address in client.scheduler_info()["workers"]
        (folder.path / "checkpoints" / "1" / "manifest.json").write_text("{}")
        assert handle.lost
        assert address not in client.scheduler_info()["workers"]


async def lost_after_the_runner():
    """Frames that the next runner's log and its source tell of, which is lost: of eight four had arrived before the
    checkpoint that this runner went on from, and two of these were predicted after it."""
    description, second = beamline("a"), Keeps()
    before = SourceActor(copy.deepcopy(description))
    await before.start(Keeps())
    position = await before.position()
    await before.close()
    resume = SourceResume(
        position={**position, "visits": {"a0": "a0"}},
        decisions=(steer(description, 1), steer(description, 2)),
        handed=dict.fromkeys(range(4, 8), "a0"),
        there=frozenset(range(8)),
        frames=8,
    )
    description.resume(position["source"], range(8))  # those before the checkpoint are not handed out by it
    async with Scheduler(host="127.0.0.1", port=0, **QUIET) as scheduler:
        roles = {"resources": {SOURCE: 1}}
        async with (
            Worker(scheduler.address, **roles) as lost,
            Worker(scheduler.address, **roles),
            Client(scheduler.address, asynchronous=True) as client,
        ):
            network = ProbeFirst(window=32, patch=20, width=8)
            parts = replace(experiment(), source=description, network=network, strategy=ER(), silent_s=30.0)
            proxy = SourceProxy(
                client, parts, due=lambda: False, reported=lambda: {"a0": set(range(2, 8))}, emit=lambda event: None
            )
            await proxy.start(lost.address, second, resume)
            await lost.close(nanny=False)
            told = []
            await proxy.apply(steer(description, 3))
            while not any(isinstance(event, ChunkArrived) and 8 in event.frame_ids for event in told):
                told += await proxy.events()
            await proxy.release()
    return [i for event in told if isinstance(event, ChunkArrived) for i in event.frame_ids]


def test_frames_from_before_the_checkpoint_are_not_told_again_where_the_source_is_lost_after_the_runner():
    told = asyncio.run(asyncio.wait_for(lost_after_the_runner(), 60))
    assert sorted(told) == list(range(8, 12))


async def slowly_measured(silent_s):
    """What is said of a source whose exposures are longer than it may be silent for."""
    source = SimulatedBeamline(
        [Stage("a", np.ones((96, 96)), 2)], probe=zone_plate(32, 10.0, counts=1e5), step=9.0, frame_rate=1.5
    )
    said = []
    async with (
        Scheduler(host="127.0.0.1", port=0, **QUIET) as scheduler,
        Worker(scheduler.address, resources={SOURCE: 1}) as worker,
        Client(scheduler.address, asynchronous=True) as client,
    ):
        network = ProbeFirst(window=32, patch=20, width=8)
        parts = replace(experiment(), source=source, network=network, strategy=ER(), silent_s=silent_s)
        proxy = SourceProxy(client, parts, due=lambda: True, reported=dict, emit=said.append)
        await proxy.start(worker.address, Takes())
        await proxy.apply(steer(source, 1))
        while not any(isinstance(event, SourceEnded) for event in said):
            said += await proxy.events()
        await proxy.release()
    return said


def test_a_source_is_not_silent_while_it_exposes(monkeypatch):
    monkeypatch.setattr(pacing, "LONGEST_S", 0.1)
    said = asyncio.run(asyncio.wait_for(slowly_measured(0.3), 60))
    assert not [event for event in said if isinstance(event, SourceSilent | SourceReopened)]
    assert [event.frame_ids for event in said if isinstance(event, ChunkArrived)] == [(0,), (1,)]


def test_after_a_raster_of_its_own_only_the_newest_position_counts_until_the_next_checkpoint():
    since, newest = (
        SinceCheckpoint({"at": 0}),
        GoOn(position={"at": 9}, applied=3, decisions=(), handed={}, arrived=frozenset(), scans={}, known=3),
    )
    assert since.instead_of(newest).position == {"at": 0}
    since.came([1])
    since.fell_back()
    assert since.instead_of(newest) is newest
    asked = since.asked()
    since.mark({"at": 5}, 2, asked)
    since.came([2])
    since.commit()
    found = since.instead_of(newest)
    assert (found.position, found.applied, found.arrived) == ({"at": 5}, 2, frozenset({2}))
    since.fell_back()
    since.mark({"at": 7}, 3, asked)
    since.commit()
    assert since.instead_of(newest) is newest, "the raster may have come before or after that position"
