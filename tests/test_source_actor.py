"""Laws of the source's actor: each scan that is measured has a name of its own, and its frames come in order."""

import asyncio
import threading

import numpy as np
from distributed import Client, Scheduler, Worker

from steering.campaign import (
    ChunkArrived,
    DecisionSuggested,
    FrameRefused,
    PredictionReady,
    ScanRevisited,
    SourceEnded,
    Steer,
)
from steering.inference import Predictor
from steering.inference.event_queue import EventQueue
from steering.policies import SpaceFilling
from steering.ptychography import zone_plate
from steering.runner.actors import call, place
from steering.runner.source_actor import SourceActor
from steering.runner.source_events import SourceResume
from steering.sources import SimulatedBeamline, Stage
from tests.test_inference import publish

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

    def measuring():
        return [thread for thread in threading.enumerate() if thread.name == "source"]

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


def test_a_source_of_a_recovered_run_learns_which_scans_had_begun():
    """One that cannot say its position: by the checkpoint and by what was logged since; a visit by its own name."""

    class Live:
        frames_dropped, heard = 0, None

        def after(self, scans):
            self.heard = list(scans)

        def chunks(self):
            yield from ()

        def close(self):
            pass

    async def heard(resume) -> list[str]:
        actor = SourceActor(Live())
        await actor.start(None, 0, resume)
        while not any(isinstance(event, SourceEnded) for event in await actor.events()):
            pass
        return actor.source.heard

    visits = {"a": "a", "b": "b", "a-visit-2": "a"}
    resume = SourceResume(position={"source": None, "visits": visits}, handed={7: "a-visit-2", 10**9: "c"})
    assert asyncio.run(heard(resume)) == ["a", "b", "a", "c"]
    assert asyncio.run(heard(SourceResume(position=None))) == []
