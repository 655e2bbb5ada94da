"""Laws of the source's actor: each scan that is measured has a name of its own, and its frames come in order."""

import asyncio
import threading

import numpy as np
from distributed import Client, Scheduler, Worker

from steering.campaign import (
    ChunkArrived,
    DecisionSuggested,
    FellBack,
    FrameRefused,
    FramesLost,
    PredictionReady,
    ScanRevisited,
    SourceEnded,
    Steer,
)
from steering.inference import Predictor
from steering.inference.event_queue import EventQueue
from steering.policies import SpaceFilling
from steering.ptychography import zone_plate
from steering.records import Geometry, make_chunk, scan_name
from steering.runner.actors import call, place
from steering.runner.asked_before import AskedBefore
from steering.runner.describe import describe
from steering.runner.given_again import unlogged
from steering.runner.source_actor import SourceActor
from steering.runner.source_events import SourceResume, Visits
from steering.runner.spool import write_spooled
from steering.sources import SimulatedBeamline, Stage
from tests.test_inference import publish
from tests.test_source_contract import live

FRAMES = 12


class Returning(SimulatedBeamline):
    """It names its scans by their first letters: the names of its stages must differ."""

    def chunks(self):
        for chunk in super().chunks():
            chunk.attrs["scan"] = chunk.attrs["scan"][0]
            yield chunk


def beamline(*names):
    """Each sample for a few frames."""
    rng = np.random.default_rng(0)
    names = [f"{name}{number}" for number, name in enumerate(names)]
    stages = [Stage(name, np.exp(1j * rng.uniform(-1, 1, (96, 96))), FRAMES) for name in names]
    return Returning(stages, probe=zone_plate(32, 10.0, counts=1e5), step=9.0, frame_rate=2000, chunk_frames=4)


async def measured(tmp_path, *names):
    """What happens at source and predictor while these samples are measured one after the other."""
    publish(tmp_path, 0)
    source = beamline(*names)
    predictor = Predictor(
        field=source.field,
        geometry=source.geometry,
        probe=source.probe,
        policy=SpaceFilling(source.candidates),
        store=tmp_path,
        truths={"a": source.truth("a0")},
    )
    actor = SourceActor(source)
    await predictor.start()
    await actor.start(predictor)
    where = tuple(map(tuple, np.tile(source.candidates[:FRAMES], (len(names), 1)).tolist()))
    decision = DecisionSuggested(time=0.0, positions=where, reasons=("why",) * len(where))
    await actor.apply(Steer(decision, None, id=1))
    events = []
    while not any(isinstance(event, SourceEnded) for event in events):
        events += await actor.events()
    said = []
    while sum(len(event.frame_ids) for event in said) < FRAMES * len(names):
        said += [event for event in await predictor.events() if isinstance(event, PredictionReady)]
    images = {scan: await predictor.live(scan) for scan in dict.fromkeys(event.scan for event in said)}
    await predictor.close()
    return events, images


def test_a_scan_name_that_returns_is_a_new_visit_and_every_frame_is_used(tmp_path):
    events, images = asyncio.run(measured(tmp_path, "a", "b", "a", "b", "a"))
    names = ["a", "b", "a-visit-2", "b-visit-2", "a-visit-3"]
    arrived = [event for event in events if isinstance(event, ChunkArrived)]
    assert list(dict.fromkeys(event.scan for event in arrived)) == names
    told = [(event.scan, event.visit) for event in events if isinstance(event, ScanRevisited)]
    assert told == [("a", "a-visit-2"), ("b", "b-visit-2"), ("a", "a-visit-3")]
    ids = [i for event in arrived for i in event.frame_ids]
    assert ids == list(range(FRAMES * len(names)))
    assert {scan: image.sizes["frame"] for scan, image in images.items()} == dict.fromkeys(names, FRAMES)
    assert "truth_phase" in images["a-visit-3"]  # the sample is the same
    assert "truth_phase" not in images["b-visit-2"]


def test_a_scan_whose_name_no_folder_can_have_gets_another_one_before_its_first_frame_is_used():
    visits, called, told = Visits(), [], []
    for own in (".a", ".a", "x" * 100, ".a", "x" * 101, "x" * 102, "x" * 100, "", "a/b", "a_b"):
        one = make_chunk(np.ones((1, 8, 8), np.uint16), [0], np.zeros((1, 2)), Geometry(shape=(8, 8)), scan=own)
        event = visits.note(one)
        told += [] if event is None else [describe(event)]
        called.append(one.attrs["scan"])
        assert scan_name(called[-1]) == called[-1]  # which is what RunFolder.write_object asks for
        assert one.attrs.get("visit_of", called[-1]) == own  # by which its truth is known
    assert called[0] == called[1]
    assert len(set(called)) == len(called) - 1
    assert called[2] == "x" * 100
    assert called[3] == f"{called[0]}-visit-2"
    assert called[-1] == "a_b"
    assert told[:2] == [
        f"the scan '.a' is called {called[0]}: names have 1 to 100 bytes, no slash, no leading dot",
        f"back at .a: its new frames are the scan {called[3]}",
    ]


class Sink:
    """Takes what is measured."""

    chunks = 0

    async def receive(self, chunk):
        self.chunks += 1


def test_while_nobody_hears_the_source_the_events_stay_bounded_and_every_frame_is_told_of_later(monkeypatch):
    """As with a runner that stands still: frames wait, then the oldest are dropped and counted."""
    monkeypatch.setattr(EventQueue.__init__, "__defaults__", (10,))
    frames = 600
    rng = np.random.default_rng(0)
    stage = Stage("a", np.exp(1j * rng.uniform(-1, 1, (96, 96))), frames)
    source = SimulatedBeamline(
        [stage], probe=zone_plate(32, 10.0, counts=1e5), step=2.0, frame_rate=5e3, chunk_frames=4
    )

    async def main():
        actor, sink = SourceActor(source), Sink()
        await actor.start(sink)
        where = tuple(map(tuple, source.candidates[:frames].tolist()))
        await actor.apply(Steer(DecisionSuggested(time=0.0, positions=where, reasons=("",) * len(where)), None, id=1))
        while not source.frames_dropped:
            await asyncio.sleep(0.01)
        stopped, events = sink.chunks, []
        while not any(isinstance(event, SourceEnded) for event in events):
            events += await actor.events()
        return stopped, events, await actor.queues()

    stopped, events, queues = asyncio.run(main())
    assert stopped == 10
    assert queues["events_waited"] >= 1
    arrived = sum(len(event.frame_ids) for event in events if isinstance(event, ChunkArrived))
    dropped = sum(event.count for event in events if isinstance(event, FrameRefused))
    assert dropped > 0
    assert arrived + dropped == len(source.candidates[:frames])


def test_a_source_whose_runner_is_lost_ends():
    """Else it would take frames from a detector that the next runner's source asks too."""

    before = threading.enumerate()

    def measuring():
        return [thread for thread in threading.enumerate() if thread.name == "source" and thread not in before]

    async def main():
        quiet = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
        async with Scheduler(host="127.0.0.1", port=0, **quiet) as scheduler, Worker(scheduler.address) as worker:
            async with Client(scheduler.address, asynchronous=True) as runner:
                sink = await place(runner, Sink(), worker=worker.address)
                source = await place(runner, SourceActor(beamline("a")), worker=worker.address)
                await call(source.actor, "start", sink.actor)
                await asyncio.sleep(1.5)
                assert len(measuring()) == 1, "it waits for decisions"
            while measuring():
                await asyncio.sleep(0.05)

    asyncio.run(main())


class Live:
    """As a live source: it cannot say where it was, and hands out what comes."""

    frames_dropped, frame_rate = 0, 100.0

    def __init__(self, *chunks):
        self.heard, self.asked, self.given = None, [], chunks

    def after(self, scans):
        self.heard = list(scans)

    def apply(self, decision):
        self.asked += decision.positions.tolist() + ["stop"] * decision.stop

    def chunks(self):
        yield from self.given

    def close(self):
        pass


class Keeps(Sink):
    """Takes what is measured, and remembers it."""

    def __init__(self):
        self.frames = []

    async def receive(self, chunk):
        self.frames += [(chunk.attrs["scan"], i) for i in chunk["frame"].values.tolist()]


async def resumed(source, resume, *steers, spool=None):
    """(what a source is asked for and tells that goes on from there, what the predictor gets)."""
    actor, keeps = SourceActor(source, spool=spool), Keeps()
    await actor.start(keeps, 0, resume)
    for steer in steers:
        await actor.apply(steer)
    events = []
    while not any(isinstance(event, SourceEnded) for event in events):
        events += await actor.events()
    return events, keeps.frames


def test_a_source_of_a_recovered_run_learns_which_scans_had_begun():
    """One that cannot say its position: by the checkpoint and by what was logged since; a visit by its own name."""
    visits, source = {"a": "a", "b": "b", "a-visit-2": "a"}, Live()
    resume = SourceResume(position={"source": None, "visits": visits}, handed={7: "a-visit-2", 10**9: "c"})
    asyncio.run(resumed(source, resume))
    assert source.heard == ["a", "b", "a", "c"]
    source = Live()
    asyncio.run(resumed(source, SourceResume(position=None)))
    assert source.heard == []


def frames(*ids, scan="a"):
    """Each was measured where its id says."""
    geometry = Geometry(shape=(8, 8), wavelength=1e-10, distance=1.0, detector_pixel=1e-4)
    where = np.array([(i, 0.0) for i in ids])
    return make_chunk(np.ones((len(ids), 8, 8), np.uint16), np.array(ids), where, geometry, scan=scan)


def steer(number, *where, **more):
    """A decision for places that are told apart by one number."""
    positions = tuple((float(x), 0.0) for x in where)
    said = {"positions": positions, "reasons": ("why",) * len(where), **more}
    return Steer(DecisionSuggested(time=0.0, **said), 0, id=number)


def places(actions):
    return [int(x) for one in actions for x, _ in (one.decision.positions if isinstance(one, Steer) else one.positions)]


def test_what_was_asked_for_before_everything_was_lost_is_asked_for_once_and_only_when_the_beamline_is_quiet():
    fallen = FellBack(time=0.0, positions=((4.0, 0.0),), since=0.0)
    before = AskedBefore([steer(3, 1, 2, 3, dwell=(0.1, 5.0, 20.0), stop=True), fallen])
    assert before.due(1e9) == [], "nobody listens yet"
    before.listening(100.0)
    assert before.due(129.0) == [], "the longest exposure may be going on"
    before.busy()
    assert before.due(1e9) == [], "a frame is being handed on"
    before.came(np.array([[1.1, 0.0]]))
    before.listening(130.0)
    assert before.holds(steer(5, 6))
    assert before.due(159.0) == []
    due = before.due(160.5)
    assert places(due) == [2, 3, 4, 6]
    assert due[0].decision.dwell == (5.0, 20.0)
    assert due[0].decision.stop, "the end of the scan comes after what is left of it"
    assert not before.holds(steer(6, 7))
    assert before.due(1e9) == [], "once"
    late = AskedBefore([steer(3, 1, 2)])
    assert late.holds(steer(4, 3))
    late.came(np.array([[2.0, 0.1]]))
    late.lost(1)
    assert late.holds(steer(5, 4)), "behind what waits"
    assert places(late.due(0.0)) == [3, 4], "all that was asked for before has come"
    slow = AskedBefore([steer(3, 1)], frame_s=30.0)
    slow.listening(0.0)
    assert not slow.due(39.0)
    assert slow.due(41.0)
    deaf = AskedBefore([steer(3, 1, 2, 3, 4)])
    deaf.came(np.array([[3.2, 0.1], [3.9, 0.0]]))
    deaf.listening(0.0)
    assert places(deaf.due(11.0)) == [1, 2], "these were measured while nobody listened"
    assert not AskedBefore().holds(steer(1, 1)), "nothing was asked for"


def test_a_live_source_is_asked_again_for_what_has_brought_no_frame_and_for_nothing_else(monkeypatch):
    """Decisions that the log knows, and of which all frames had arrived, are not carried out twice; one whose id is
    newer waits behind those that are asked for once more."""
    monkeypatch.setattr("steering.runner.asked_before.QUIET_S", 0.0)
    logged = (steer(3, 1, 2), steer(4, 3, 4), steer(5, 5, 6))
    resume = SourceResume(
        position={"source": None, "visits": {"a": "a"}, "steered": 2, "told": 4},
        decisions=logged,
        handed=dict.fromkeys(range(4, 9), "a"),
        there=frozenset(range(9)),
        asked=(steer(5, 6),),
    )
    source = Live()
    released = threading.Event()

    def chunks():
        while not released.wait(0.01):
            pass
        yield from ()

    source.chunks = chunks

    async def main():
        actor = SourceActor(source)
        await actor.start(Sink(), 0, resume)
        for one in (*logged, steer(6, 7, 8)):
            await actor.apply(one)
        while len(source.asked) < 3:
            await asyncio.sleep(0.01)
        assert (await actor.position())["steered"] == 6
        released.set()
        while not any(isinstance(event, SourceEnded) for event in await actor.events()):
            pass

    asyncio.run(main())
    assert source.asked == [[6.0, 0.0], [7.0, 0.0], [8.0, 0.0]]


def test_a_receiving_process_that_is_started_anew_measures_what_is_left_and_goes_on(monkeypatch):
    monkeypatch.setattr("steering.runner.asked_before.QUIET_S", 0.0)
    source = live()
    where = [tuple(place) for place in source.candidates[:6].tolist()]

    def decided(number, positions):
        said = {"positions": tuple(positions), "reasons": ("why",) * len(positions)}
        return Steer(DecisionSuggested(time=0.0, **said), 0, id=number)

    logged = (decided(1, where[:2]), decided(2, where[2:4]))
    resume = SourceResume(
        position={"source": None, "visits": {"scan": "scan"}, "steered": 0},
        decisions=logged,
        handed=dict.fromkeys(range(100, 103), "scan"),
        there=frozenset(range(100, 103)),
        asked=(decided(2, where[3:4]),),
    )

    class Places(Sink):
        found = ()

        async def receive(self, chunk):
            pairs = zip(chunk["position_y"].values.tolist(), chunk["position_x"].values.tolist(), strict=True)
            self.found = (*self.found, *pairs)

    async def main():
        actor, places = SourceActor(source), Places()
        await actor.start(places, 0, resume)
        for one in (*logged, decided(3, where[4:])):
            await actor.apply(one)
        while len(places.found) < 3:
            await actor.events()
        await actor.close()
        while not any(isinstance(event, SourceEnded) for event in await actor.events()):
            pass
        return places.found

    np.testing.assert_allclose(asyncio.run(asyncio.wait_for(main(), 60)), where[3:], atol=1e-9)


def test_frames_that_come_late_are_those_of_what_was_asked_for_before():
    """All of them come: nothing is asked for twice. What the stream has sent before is not taken again."""
    resume = SourceResume(
        position={"source": None, "visits": {"a": "a"}, "steered": 5},
        handed={3: "a", 4: "a"},
        there=frozenset(range(5)),
        asked=(steer(5, 5, 6),),
    )
    source = Live(frames(2, 3, 4, 5), frames(6))
    events, had = asyncio.run(resumed(source, resume, steer(6, 8)))
    assert source.asked == [[8.0, 0.0]]
    assert had == [("a", 5), ("a", 6)]
    arrived = [(event.frame_ids, event.asked) for event in events if isinstance(event, ChunkArrived)]
    assert arrived == [((5,), ((5.0, 0.0),)), ((6,), ((6.0, 0.0),))]


def test_spooled_frames_that_the_log_did_not_learn_of_are_told_and_sent(tmp_path):
    """Everyday events reach the log a second later: what was on disk and acknowledged by then is not lost."""
    for chunk in (frames(0, 1, 2, 3, 4), frames(5, 6, 7), frames(8, 9), frames(20, scan="b"), frames(30, scan="z")):
        write_spooled(tmp_path, chunk)
    resume = SourceResume(
        position={"source": None, "visits": {"z": "z", "a": "a"}, "steered": 0},
        handed={**dict.fromkeys(range(5), "a"), 11: "a"},
        there=frozenset({0, 1}),
        over=("z",),
        asked=(steer(1, *range(5, 12)),),
        spooled=tmp_path,
    )
    source = Live(frames(8, 9), frames(20, 21, scan="b"))
    events, had = asyncio.run(resumed(source, resume, spool=tmp_path))
    expected = [("a", i) for i in range(2, 10)] + [("b", 20), ("b", 21)]
    assert had == expected, "each once"
    arrived = [(event.scan, i) for event in events if isinstance(event, ChunkArrived) for i in event.frame_ids]
    assert arrived == expected[3:]
    assert [event.frame_ids for event in events if isinstance(event, FramesLost)] == [(11,)]
    assert source.heard == ["z", "a", "b"]


def test_a_source_that_can_say_its_position_hands_out_anew_what_the_log_did_not_learn_of(tmp_path):
    write_spooled(tmp_path, frames(0, 1))
    assert list(unlogged(SourceResume(position={"source": None}, spooled=tmp_path))) == [0, 1]
    assert not unlogged(SourceResume(position={"source": beamline("a").position()}, spooled=tmp_path))
