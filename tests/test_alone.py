"""A source whose runner is lost measures what was allowed beforehand, and the next runner hears of everything once."""

import asyncio
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from distributed import Client, Scheduler, Worker

from steering.campaign import (
    ChunkArrived,
    Command,
    DecisionSuggested,
    FellBack,
    FrameRefused,
    SourceEnded,
    Steer,
)
from steering.campaign.actions import OpenActions
from steering.campaign.gate import Gate
from steering.campaign.limits import Guard, Limits
from steering.inference.policy_replay import PolicyReplay
from steering.policies import SpaceFilling
from steering.records import MEASURED, Field
from steering.runner import RunFolder
from steering.runner.actors import call, place
from steering.runner.adoption import adopted, place_source, withdraw
from steering.runner.alone import Alone, Reported, say, unsteered
from steering.runner.source_actor import SourceActor
from steering.runner.source_events import SourceResume, Standing
from tests.test_source_actor import beamline

RASTER = tuple((0.0, float(x)) for x in range(40))


def test_it_goes_on_alone_only_after_the_stated_time_and_only_with_what_was_allowed():
    alone = Alone(10.0)
    assert not alone.look(-1.0), "it has not begun"
    alone.heard(0.0, RASTER)
    alone.steered(3)
    assert not any(alone.look(float(second)) for second in range(11))
    assert alone.look(10.5)
    assert alone.block() == (), "there is something to measure yet"
    alone.arrived(3)
    first = alone.block()
    assert first == RASTER[: len(first)]
    alone.steered(len(first))
    assert alone.block() == ()
    found = list(first)
    while len(found) < len(RASTER):
        alone.arrived(100)
        found += alone.block()
    assert tuple(found) == RASTER
    assert alone.block() == (), "nothing more than was allowed"
    assert (alone.since, alone.measured) == (0.0, len(RASTER))
    assert alone.heard(60.0, ()), "it was alone"
    assert not alone.look(61.0)
    assert not alone.look(100.0), "the machine stood still"
    assert not any(alone.look(100.0 + second) for second in range(9))
    assert alone.look(111.0)
    never = Alone(None)
    never.heard(0.0, RASTER)
    assert not never.look(1e9)


def gate(**named):
    limits = Limits(area=Field(y0=-1.0, y1=1.0, x0=-1.0, x1=20.5), frames=12)
    return Gate(Guard(limits), OpenActions(), lookahead=4, scans=[], **named)


def gate_of_policy(free):
    """What the policy is asked with, once all is measured."""
    free.arrived(5)
    return free.ask()


def test_the_reserve_is_what_limits_allow_and_nothing_where_a_person_has_a_say():
    free = gate()
    assert free.reserve(RASTER) == RASTER[:12]
    free.fell_back(FellBack(time=0.0, positions=RASTER[:5], since=0.0))
    assert free.outstanding == 5
    [asked] = gate_of_policy(free)
    assert [(part.decision.positions, part.reason) for part in asked.declined] == [(RASTER[:5], MEASURED)]
    assert free.reserve(RASTER[5:]) == RASTER[5:12], "what was measured counts"
    assert gate(approval_s=60.0).reserve(RASTER) == ()
    free.obey(Command(time=0.0, name="pause"))
    assert free.reserve(RASTER) == ()
    free.obey(Command(time=0.0, name="resume"))
    free.close()
    assert free.reserve(RASTER) == ()


def test_after_a_stop_nothing_is_measured_without_a_runner():
    over = gate()
    over.take(DecisionSuggested(time=0.0, positions=RASTER[:2], reasons=("a", "b"), stop=True))
    assert over.reserve(RASTER) == ()


def test_a_policy_does_not_decide_on_what_was_measured_without_it():
    source = beamline("a")
    policy, replay = SpaceFilling(source.candidates), PolicyReplay()
    measured = [tuple(p) for p in source.candidates[5:12].tolist()]
    part = DecisionSuggested(time=0.0, positions=tuple(measured), reasons=())
    found = replay.suggest(policy, 4).positions.tolist()
    free = [where for where in measured if list(where) not in found]
    replay.decline(policy, [(replace(part, positions=tuple(free)), MEASURED)])
    stop = False
    while not stop:
        decision = replay.suggest(policy, 4)
        found, stop = [*found, *decision.positions.tolist()], decision.stop
    assert sorted([*map(tuple, found), *free]) == sorted(map(tuple, source.candidates.tolist()))


def test_what_the_log_lacks_is_told_again_and_nothing_else():
    told = Reported()
    for number in range(3):
        told.note(ChunkArrived(time=float(number), scan="a", frame_ids=(2 * number, 2 * number + 1)))
    mark = told.mark()
    told.note(ChunkArrived(time=3.0, scan="a", frame_ids=(6, 7)))
    told.note(FrameRefused(time=4.0, count=1, reason="no"))
    told.note(FrameRefused(time=5.0, count=2, reason="no"))
    told.note(Standing(time=6.0, position=None, applied=0))
    resume = SourceResume(position={}, handed={6: "a"}, logged=frozenset({4.0}))
    found = told.again(mark, resume, [SourceEnded(time=7.0)])
    assert [type(event).__name__ for event in found] == ["ChunkArrived", "FrameRefused", "SourceEnded"]
    assert found[0].frame_ids == (7,)
    assert found[1].time == 5.0
    for _ in range(20):
        told.mark()
    assert told.again(0, SourceResume(position={}), []) == [], "what no checkpoint needs is forgotten"
    assert told.forgotten == 6, "a checkpoint before that is too old to go on from"


class Predictor:
    """Takes chunks, until it is lost."""

    def __init__(self, silent=False):
        self.frames, self.lost, self.silent = Counter(), False, silent

    async def receive(self, chunk):
        if self.lost and self.silent:
            await asyncio.Event().wait()
        if self.lost:
            raise OSError("gone")
        self.frames.update(chunk["frame"].values.tolist())

    async def taken(self):
        return self.frames


async def left_alone(folder, silent):
    source, first, second = beamline("a"), Predictor(silent), Predictor()
    where = [tuple(p) for p in source.candidates[:12].tolist()]
    actor = SourceActor(source, folder=folder, unsteered_s=0.3)
    await actor.start(first)
    await actor.beat(tuple(where[4:8]))
    decision = DecisionSuggested(time=0.0, positions=tuple(where[:4]), reasons=("why",) * 4)
    await actor.apply(Steer(decision, None, id=1))
    position, logged = await actor.position(), []
    while sum(first.frames.values()) < 4:
        await asyncio.sleep(0.01)
    unheard = asyncio.ensure_future(actor.events())  # what the runner is told while it dies
    await asyncio.sleep(0.05)
    first.lost = True
    while (said := unsteered(folder.path)) is None or said["measured"] < 4:
        await asyncio.sleep(0.01)
    resume = SourceResume(position=position, handed=dict.fromkeys(logged, "a0"))
    assert not await actor.adopt("another run", second, resume)
    assert await actor.adopt(folder.identity, second, resume)
    assert unheard.done()
    told = await actor.events()
    await actor.apply(Steer(decision, None, id=1))  # it has that
    await actor.apply(Steer(DecisionSuggested(time=1.0, positions=tuple(where[8:]), reasons=("w",) * 4), None, id=2))
    while sum(second.frames.values()) < 12:
        await asyncio.sleep(0.01)
    told += await actor.events()
    await actor.close()
    return told, second.frames, said, (await actor.position())["steered"]


@pytest.mark.parametrize("silent", [False, True])
def test_the_next_runner_adopts_it_and_hears_of_every_frame_once(tmp_path, silent):
    """The predictor went with the runner: it refuses what it is sent, or never answers."""
    folder = RunFolder.create(tmp_path / "run")
    told, frames, said, steered = asyncio.run(asyncio.wait_for(left_alone(folder, silent), 60))
    arrived = Counter(i for event in told if isinstance(event, ChunkArrived) for i in event.frame_ids)
    assert arrived == dict.fromkeys(range(12), 1)
    assert frames == dict.fromkeys(range(12), 1)
    assert sum(len(event.positions) for event in told if isinstance(event, FellBack)) == 4
    assert said["measured"] == 4
    assert unsteered(folder.path) is None, "it is taken back"
    assert steered == 2


async def while_it_is_asked(folder):
    source, predictor = beamline("a"), Predictor()
    actor = SourceActor(source, folder=folder, unsteered_s=60.0)
    await actor.start(predictor)
    where = tuple(map(tuple, source.candidates[:4].tolist()))
    position = await actor.position()
    await actor.apply(Steer(DecisionSuggested(time=0.0, positions=where, reasons=("why",) * 4), None, id=1))
    unlogged = []
    while sum(len(event.frame_ids) for event in unlogged if isinstance(event, ChunkArrived)) < 4:
        unlogged += await actor.events()
    unanswered = asyncio.ensure_future(actor.events())
    await asyncio.sleep(0.05)
    assert not unanswered.done()
    steer = Steer(DecisionSuggested(time=0.0, positions=where, reasons=("why",) * 4), None, id=1)
    assert await actor.adopt(folder.identity, predictor, SourceResume(position=position, decisions=(steer,)))
    with pytest.raises(RuntimeError, match="another runner"):
        await unanswered
    told = await actor.events()
    await actor.close()
    return told


def test_what_the_next_runner_is_told_again_does_not_go_to_a_call_that_the_last_one_has_left_open(tmp_path):
    told = asyncio.run(asyncio.wait_for(while_it_is_asked(RunFolder.create(tmp_path / "run")), 60))
    assert [i for event in told if isinstance(event, ChunkArrived) for i in event.frame_ids] == [0, 1, 2, 3]


async def on_a_cluster(folder):
    """The same with Dask: the actor outlives the client that has placed it."""
    source = beamline("a")
    where = [tuple(p) for p in source.candidates[:8].tolist()]
    decision = DecisionSuggested(time=0.0, positions=tuple(where[:4]), reasons=("why",) * 4)
    quiet = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    async with Scheduler(host="127.0.0.1", port=0, **quiet) as scheduler, Worker(scheduler.address) as worker:
        async with Client(scheduler.address, asynchronous=True) as runner:
            first = await place(runner, Predictor(), worker=worker.address)
            actor = SourceActor(source, folder=folder, unsteered_s=0.3)
            handle = await place_source(runner, actor, worker.address)
            await call(handle.actor, "start", first.actor)
            await call(handle.actor, "beat", tuple(where[4:]))
            await call(handle.actor, "apply", Steer(decision, None, id=1))
            position = await call(handle.actor, "position")
            del first
        while (unsteered(folder.path) or {"measured": 0})["measured"] < 4:
            await asyncio.sleep(0.05)
        async with Client(scheduler.address, asynchronous=True) as runner:
            second = await place(runner, Predictor(), worker=worker.address)
            handle = await adopted(runner, folder, second.actor, SourceResume(position=position))
            assert handle is not None
            told = []
            while sum(len(event.frame_ids) for event in told if isinstance(event, ChunkArrived)) < 8:
                told += await call(handle.actor, "events")
            frames = await call(second.actor, "taken")
            await call(handle.actor, "close")
            await withdraw(runner)
    return told, frames


def test_its_actor_outlives_the_runner(tmp_path):
    told, frames = asyncio.run(asyncio.wait_for(on_a_cluster(RunFolder.create(tmp_path / "run")), 60))
    arrived = Counter(i for event in told if isinstance(event, ChunkArrived) for i in event.frame_ids)
    assert arrived == frames == dict.fromkeys(range(8), 1)
    assert sum(len(event.positions) for event in told if isinstance(event, FellBack)) == 4


def test_a_source_that_heard_a_decision_which_the_log_lacks_is_not_adopted(tmp_path):
    """The campaign would decide anew, under the same id, and wait for ever for what the source leaves out."""

    async def main(folder):
        source = beamline("a")
        actor = SourceActor(source, folder=folder, unsteered_s=5.0)
        await actor.start(Predictor())
        position = await actor.position()
        where = (tuple(source.candidates[0].tolist()),)
        await actor.apply(Steer(DecisionSuggested(time=0.0, positions=where, reasons=("why",)), None, id=1))
        assert not await actor.adopt(folder.identity, Predictor(), SourceResume(position=position))
        events = []
        while not any(isinstance(event, SourceEnded) for event in events):  # it ends, for another one begins
            events += await actor.events()

    asyncio.run(asyncio.wait_for(main(RunFolder.create(tmp_path / "run")), 60))


def test_what_stands_in_a_folder_is_believed_only_where_it_makes_sense(tmp_path):
    alone = Alone(5.0)
    alone.heard(1.0, ())
    assert [alone.look(float(second)) for second in range(5, 8)] == [False, False, True]
    say(tmp_path, alone)
    assert unsteered(tmp_path) == {"since": 1.0, "measured": 0}
    (tmp_path / "unsteered.json").write_text('{"since": "x"}')
    assert unsteered(tmp_path) is None


@pytest.mark.parametrize("seconds", [0.0, 4.9, np.inf])
def test_too_short_a_time_is_refused(seconds):
    from tests.test_experiment import experiment

    with pytest.raises(ValueError, match="expected 5 seconds or more"):
        experiment(unsteered_s=seconds)


async def closed(given_up):
    source, first, second = beamline("a"), Predictor(), Predictor()
    actor = SourceActor(source)
    await actor.start(first)
    where = tuple(map(tuple, source.candidates[:4].tolist()))
    await actor.apply(Steer(DecisionSuggested(time=0.0, positions=where, reasons=("why",) * 4), None, id=1))
    while sum(first.frames.values()) < 4:
        await asyncio.sleep(0.01)
    await actor.close()
    if given_up:
        await actor.forgotten()
    return await actor.go_on_with(second, 1), first.frames, second.frames


def test_a_predictor_that_comes_when_all_is_measured_is_sent_all_of_it():
    """The last refinement of a scan still needs it; not from a source that another one has replaced."""
    sent, first, second = asyncio.run(closed(given_up=False))
    assert sorted(sent) == sorted(first)
    assert first == second
    assert asyncio.run(closed(given_up=True))[::2] == ([], Counter())
