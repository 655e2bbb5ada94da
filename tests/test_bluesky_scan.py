"""A steered scan by a real RunEngine with ophyd-async devices, and its documents as a live source."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from steering.records import Decision
from steering.sources.addresses import frames_at, streams_at
from steering.sources.streams import Began, Ended, Frame, Samples, Unreadable
from tests.serving import ROOT, beamline as simulated, gathered
from tests.test_receiver import WINDOW, Consumer, adds_up, source

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("bluesky")]
pytest.importorskip("bluesky")
pytest.importorskip("ophyd_async")

import zmq  # noqa: E402
from bluesky import RunEngine  # noqa: E402
from bluesky.utils import RunEngineInterrupted  # noqa: E402
from event_model import DocumentNames, schema_validators  # noqa: E402
from ophyd_async.core import init_devices  # noqa: E402
from ophyd_async.sim import SimMotor  # noqa: E402

from served.bluesky import Camera  # noqa: E402
from steering.sources.bluesky_plan import CampaignConnection, steered_scan, to_json  # noqa: E402

REST = (1.5, -2.5)
POINTS = 1e-3 * np.arange(40.0).reshape(20, 2)
"""Metres; the motors count millimetres."""


def picture(y: float, x: float) -> np.ndarray:
    """A frame that says where it was measured."""
    frame = np.zeros((WINDOW, WINDOW), np.uint16)
    frame[0, :2] = round(y), round(x)
    return frame


class Beamline:
    """A RunEngine with two motors and a camera; keeps every document, each of which event-model accepts."""

    def __init__(self, folder, exposure_s: float = 0.0) -> None:
        self.engine, self.documents = RunEngine(context_managers=[]), []  # runs outside of the main thread as well

        def measure(y, x):
            time.sleep(exposure_s)
            return picture(y, x)

        with init_devices():
            y, x = SimMotor(initial_value=REST[0]), SimMotor(initial_value=REST[1])
            camera = Camera(folder, (y, x), measure, (WINDOW, WINDOW))
        self.motors, self.camera = (y, x), camera
        self.engine.subscribe(self.take)

    def take(self, name, document) -> None:
        plain = json.loads(to_json(document))
        schema_validators[DocumentNames[name]].validate(plain)
        self.documents.append((name, plain))

    def named(self, name: str) -> list[dict]:
        return [document for one, document in self.documents if one == name]

    def where(self) -> tuple[float, ...]:
        async def read():
            return tuple([await motor.user_readback.get_value() for motor in self.motors])

        return asyncio.run_coroutine_threadsafe(read(), self.engine.loop).result(10)

    def paused_now_and_then(self, plan, rng: random.Random) -> int:
        """Run a plan, pause it at any moment, and resume it; how often that was."""
        pauses, over = 0, threading.Event()

        def pause() -> None:
            nonlocal pauses
            while not over.wait(rng.uniform(0.02, 0.5)):
                if self.engine.state == "running":
                    try:
                        self.engine.request_pause()
                        pauses += 1
                    except Exception:  # it has ended meanwhile
                        return

        thread = threading.Thread(target=pause)
        thread.start()
        try:
            self.engine(plan)
        except RunEngineInterrupted:
            while self.engine.state == "paused":
                try:
                    self.engine.resume()
                except RunEngineInterrupted:
                    continue
        over.set()
        thread.join()
        return pauses


@pytest.fixture
def campaign():
    with CampaignConnection(field=(-1, 100, -1, 100)) as one:
        yield one


def streams_of(campaign, beamline):
    where = campaign.addresses
    y, x = beamline.motors
    return streams_at(where["frames"], f"{where['positions']}?y={y.name}&x={x.name}&unit=mm", where["motion"])


def asked(points, *, stop: bool = False) -> Decision:
    return Decision(positions=points, reasons=("test",) * max(len(points), 1), stop=stop)


def test_a_steered_scan_that_is_paused_at_any_moment_measures_every_point_once(tmp_path, campaign):
    """Each point has one event and one frame, which was taken there, and event-model accepts every document."""
    beamline = Beamline(tmp_path, exposure_s=0.03)
    campaign.measure(*POINTS[:10].T)
    threading.Timer(0.5, lambda: campaign.measure(*POINTS[10:].T, stop=True)).start()
    scan = steered_scan([beamline.camera], beamline.motors, campaign, md={"sample": "gravel"})
    assert beamline.paused_now_and_then(scan, random.Random(0)) > 1
    [start], [descriptor], [stop] = (beamline.named(name) for name in ("start", "descriptor", "stop"))
    assert (start["sample"], start["plan_name"], stop["exit_status"]) == ("gravel", "steered_scan", "success")
    assert descriptor["data_keys"]["camera"]["external"] == "STREAM:"
    last = {event["seq_num"]: event["data"] for event in beamline.named("event")}
    assert sorted(last) == list(range(1, 21))
    np.testing.assert_allclose([[last[k]["y"], last[k]["x"]] for k in sorted(last)], 1e3 * POINTS)
    assert beamline.where() == REST
    # what a consumer makes of them
    lines = tmp_path / "run.jsonl"
    lines.write_text("".join(json.dumps(one) + "\n" for one in beamline.documents))
    streams = streams_at(f"bluesky:{lines}", f"bluesky:{lines}?y=y&x=x&unit=mm")
    consumer = Consumer(source(streams))
    consumer.over()
    assert consumer.error is None
    numbers = gathered(consumer.chunks, "frame")
    assert sorted(numbers.tolist()) == list(range(20))
    np.testing.assert_array_equal(gathered(consumer.chunks, "counts")[:, 0, :2], np.rint(1e3 * POINTS[numbers]))
    np.testing.assert_allclose(gathered(consumer.chunks, "position_x"), POINTS[numbers, 1])
    assert {chunk.attrs["scan"] for chunk in consumer.chunks} == {"gravel"}
    adds_up(consumer.live)


@pytest.mark.parametrize("way", ["abort", "stop"])
def test_a_steered_scan_that_is_ended_puts_the_motors_back_and_leaves_no_point(tmp_path, campaign, way):
    beamline = Beamline(tmp_path, exposure_s=0.02)
    campaign.measure(*POINTS.T, stop=True)
    campaign.measure(*POINTS[:1].T)  # of the next scan
    threading.Timer(0.3, beamline.engine.request_pause).start()
    with pytest.raises(RunEngineInterrupted):
        beamline.engine(steered_scan([beamline.camera], beamline.motors, campaign))
    getattr(beamline.engine, way)()
    assert beamline.engine.state == "idle"
    assert beamline.where() == REST
    assert beamline.named("stop")[0]["exit_status"] == {"abort": "abort", "stop": "success"}[way]
    assert campaign.take()[0] is not None
    assert campaign.take() == (None, False)


def test_a_served_beamline_that_is_told_to_end_does_so_in_order(tmp_path):
    command = [sys.executable, "-m", "steering.cli", "run", "--out", str(tmp_path / "run")]
    command += [str(ROOT / "workflows" / "serve_simulated.py"), "--protocol", "bluesky", "--samples", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as server:
        for line in server.stdout:
            if "served" in line:
                break
        server.terminate()
        rest, _ = server.communicate(timeout=60)
    assert server.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in rest
    assert "Traceback" not in rest
    assert "RunEngine" not in rest


def test_the_served_beamline_has_no_beam_where_that_is_asked_for(tmp_path):
    import h5py

    from served.bluesky import DATA, BlueskyBeamline
    from served.faults import Faults

    here = simulated(8)
    at_bluesky = BlueskyBeamline(here, tmp_path)
    at_bluesky.campaign.measure(*here.candidates[:8].T)
    assert at_bluesky.run(Faults(dark_from=2, dark_frames=3)) == {"frames": 8, "dropped": 0}
    at_bluesky.close()
    with h5py.File(tmp_path / "frames-0.h5") as file:
        assert np.flatnonzero(file[DATA][:].sum((1, 2)) == 0).tolist() == [2, 3, 4]


def test_a_run_that_is_over_is_not_sent_to_who_comes_late(campaign):
    """It would be taken for the scan that is next."""
    context = zmq.Context()

    def listener() -> zmq.Socket:
        socket = context.socket(zmq.SUB)
        socket.set(zmq.RCVTIMEO, 30_000)
        socket.connect(campaign.addresses["frames"].replace("bluesky:", "tcp:"))
        socket.subscribe(b"")
        return socket

    first = listener()
    for name in ("start", "stop"):
        campaign(name, {"uid": "a"})
        assert first.recv() == f' {name} {{"uid": "a"}}'.encode()
    late = listener()
    campaign("start", {"uid": "b"})
    assert late.recv() == b' start {"uid": "b"}'
    context.destroy(linger=0)


def test_a_campaign_that_is_silent_ends_the_plan(tmp_path):
    """Silent while the plan asks, not before it began to."""
    beamline = Beamline(tmp_path)
    with CampaignConnection(silent_s=0.4) as campaign:
        time.sleep(0.5)

        def answer_later(name, document) -> None:
            threading.Timer(0.2, campaign.measure, POINTS[:2].T, {"stop": True}).start()

        answering = beamline.engine.subscribe(answer_later, "start")
        beamline.engine(steered_scan([beamline.camera], beamline.motors, campaign))
        beamline.engine.unsubscribe(answering)
        with pytest.raises(TimeoutError, match=r"no word from the campaign for 0\.4 s"):
            beamline.engine(steered_scan([beamline.camera], beamline.motors, campaign))
    assert [stop["exit_status"] for stop in beamline.named("stop")] == ["success", "fail"]


def test_a_live_source_steers_a_plan_and_gets_what_it_measures(tmp_path, campaign):
    """Two scans; the source comes when the first run is going on already."""
    beamline = Beamline(tmp_path)
    beamline.engine.subscribe(campaign)
    campaign.measure(*POINTS[:2].T)

    def scans() -> None:
        for name in ("gravel", "pores"):
            beamline.engine(steered_scan([beamline.camera], beamline.motors, campaign, md={"sample": name}))

    plans = threading.Thread(target=scans)
    plans.start()
    end = time.monotonic() + 30
    while len(beamline.named("event")) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    live = source(streams_of(campaign, beamline), scans=2)
    consumer = Consumer(live)
    live.apply(asked(POINTS[2:12], stop=True))
    live.apply(asked(np.array([[1.0, 0.0]])))  # beyond the field: refused
    live.apply(asked(POINTS[12:], stop=True))
    consumer.over()
    plans.join(30)
    assert consumer.error is None
    scan = np.concatenate([[chunk.attrs["scan"]] * chunk.sizes["frame"] for chunk in consumer.chunks])
    numbers = gathered(consumer.chunks, "frame") % 10**9 + 12 * (scan == "pores")
    assert sorted(numbers.tolist()) == list(range(20))
    np.testing.assert_array_equal(gathered(consumer.chunks, "counts")[:, 0, :2], np.rint(1e3 * POINTS[numbers]))
    np.testing.assert_allclose(gathered(consumer.chunks, "position_y"), POINTS[numbers, 0])
    adds_up(live)
    assert live.frames_dropped == 1  # the one that was refused


def records(path, text: str, **options):
    lines = path / "documents.jsonl"
    lines.write_text(text)
    more = "&".join(f"{name}={value}" for name, value in options.items())
    frames = frames_at(f"bluesky:{lines}?{more}")
    frames = replace(frames, documents=replace(frames.documents, patience_s=0.1))
    return list(frames.records(threading.Event()))


def run_of(*keys: str, shape=(4, 4), mimetype="application/x-hdf5", uri="file://localhost/nowhere.h5") -> str:
    data_keys = {key: {"dtype": "array", "shape": list(shape), "external": "STREAM:", "source": ""} for key in keys}
    resource = {"uid": "c", "data_key": keys[0], "mimetype": mimetype, "uri": uri, "parameters": {"dataset": "d"}}
    ranges = {"indices": {"start": 0, "stop": 1}, "seq_nums": {"start": 1, "stop": 2}}
    documents = [
        ("start", {"uid": "a", "time": 0.0, "scan_id": 7}),
        ("descriptor", {"uid": "b", "run_start": "a", "name": "primary", "data_keys": data_keys}),
        ("stream_resource", resource),
        ("stream_datum", {"uid": "c/0", "stream_resource": "c", "descriptor": "b", **ranges}),
    ]
    return "".join(json.dumps(one) + "\n" for one in documents)


def test_documents_that_cannot_be_used_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"the frames of one, two, expected one of them: add \?data=NAME"):
        records(tmp_path, run_of("one", "two"))
    with pytest.raises(ValueError, match="3 frames of one for each event, expected one"):
        records(tmp_path, run_of("one", shape=(3, 4, 4)))
    with pytest.raises(ValueError, match=r"found multipart/related;type=image/tiff at .*, expected application/x-hdf5"):
        records(tmp_path, run_of("one", mimetype="multipart/related;type=image/tiff"))
    with pytest.raises(OSError, match=r"/nowhere.h5: found no rows 0 to 1 of d .*is the file's folder reached"):
        records(tmp_path, run_of("one"))
    broken = 'nonsense\n["event", {}]\n["start", 3]\n[1, {}]\n' + '["event", {"descriptor": "z"}]\n' * 2
    found = records(tmp_path, broken)
    assert all(isinstance(one, Unreadable) for one in found[:-1])
    assert found[-1] == Ended(last=True)
    other = records(tmp_path, run_of("one").replace('"one"', '"other"'), data="one")  # a run of something else
    assert not any(isinstance(one, Began | Frame | Samples) for one in other)


def test_pickled_documents_are_not_opened():
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("it was opened",))

    found, stopped = [], threading.Event()
    context = zmq.Context()
    publisher = context.socket(zmq.PUB)
    port = publisher.bind_to_random_port("tcp://127.0.0.1")

    def listen() -> None:
        for one in frames_at(f"bluesky://127.0.0.1:{port}").records(stopped):
            found.extend([one] if one is not None else [])
            if found:
                return

    listener = threading.Thread(target=listen)
    listener.start()
    end = time.monotonic() + 30
    while listener.is_alive() and time.monotonic() < end:
        publisher.send(b" start " + pickle.dumps({"uid": Trap()}))
        time.sleep(0.05)
    stopped.set()
    listener.join(10)
    context.destroy(linger=0)
    assert isinstance(found[0], Unreadable)
    assert found[0].reason.startswith("a pickled document, which is not opened: publish with Publisher(")
