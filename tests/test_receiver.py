"""The receiving process: what fails there is said in one sentence, and restarts and silences are counted."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from steering.records import Decision, Geometry
from steering.sources import JoinSettings, LiveSource, LiveSourceSettings, Streams, Window, live
from steering.sources.addresses import streams_at
from steering.sources.beam import BeamSettings
from steering.sources.join import BEYOND, GIVEN_UP
from steering.sources.motion import Carrier, Order, ZmqMotion
from steering.sources.streams import ARMED, Began, Ended, Frame, Samples
from steering.sources.tape import record
from tests.loop_beamline import WINDOW, LoopFrames, LoopMotion, Silent, Told
from tests.serving import gathered

pytestmark = pytest.mark.slow
sys.path.append(str(Path(__file__).parents[1] / "workflows"))
zmq = pytest.importorskip("zmq")
cbor2 = pytest.importorskip("cbor2")
from served.dectris import DectrisPublisher  # noqa: E402
from served.zmq_motion import PandaAndMotion  # noqa: E402

COUNTS = np.random.default_rng(0).poisson(3, (8, WINDOW, WINDOW)).astype(np.uint16)
WHERE = 1e-8 * np.arange(200.0).reshape(100, 2)


def source(streams: Streams, *, wait_s: float = 5.0, **settings) -> LiveSource:
    return LiveSource(
        streams,
        window=Window(size=WINDOW, dtype="uint16"),
        geometry=Geometry(shape=(WINDOW, WINDOW)),
        probe=np.ones((1, WINDOW, WINDOW), np.complex64),
        candidates=WHERE,
        settings=LiveSourceSettings(join=JoinSettings(wait_s=wait_s), **settings),
    )


def of(publisher: DectrisPublisher, **settings) -> LiveSource:
    return source(streams_at(publisher.addresses["frames"], publisher.addresses["positions"]), **settings)


def loop(*, reach: float = np.inf, broken_at: int = -1, connects_s: float = 0.0, **settings) -> LiveSource:
    frames = LoopFrames(frames=40, broken_at=broken_at, connects_s=connects_s)
    streams = Streams(frames=frames, positions=Silent(), motion=LoopMotion(reach=reach))
    return source(streams, **settings)


def asked(n: int, *, stop: bool = False) -> Decision:
    return Decision(positions=WHERE[:n], reasons=("test",) * n, stop=stop)


def adds_up(live: LiveSource) -> None:
    for name, stream in live.streams.items():
        assert stream["received"] == stream["joined"] + sum(stream["dropped"].values()) + stream["waiting"], name


class Consumer(threading.Thread):
    """Takes the chunks in a thread, as the source's actor does."""

    def __init__(self, live: LiveSource) -> None:
        super().__init__(daemon=True)
        self.live, self.chunks, self.error = live, [], None
        self.start()

    def run(self) -> None:
        try:
            for chunk in self.live.chunks():
                self.chunks.append(chunk)
        except RuntimeError as error:
            self.error = error

    def until(self, frames: int) -> None:
        end = time.monotonic() + 60
        while sum(chunk.sizes["frame"] for chunk in self.chunks) < frames and self.error is None:
            assert time.monotonic() < end, self.live.streams
            time.sleep(0.01)

    def over(self) -> None:
        self.join(60)
        assert not self.is_alive()


def send(publisher: DectrisPublisher, first: int, last: int, *, positions: bool = True) -> None:
    for number in range(first, last):
        publisher.frame(number, COUNTS[number % len(COUNTS)])
        if positions:
            publisher.position(number, WHERE[number])


def test_a_server_that_is_restarted_in_the_middle_of_a_scan():
    first = DectrisPublisher()
    ports = {name: int(address.split(":")[2].split("?")[0]) for name, address in first.addresses.items()}
    consumer = Consumer(of(first))
    first.begin("gravel")
    send(first, 0, 30)
    consumer.until(30)
    first.close()
    again = DectrisPublisher(port=ports["frames"], positions_port=ports["positions"])
    again.begin("gravel")
    send(again, 0, 20)
    again.end(20, last=True)
    consumer.over()
    again.close()
    assert consumer.error is None
    ids = gathered(consumer.chunks, "frame")
    assert sorted(ids.tolist()) == [*range(30), *range(10**9, 10**9 + 20)]
    assert consumer.live.frames_dropped == 0
    adds_up(consumer.live)


@pytest.mark.parametrize("detector_first", [False, True])
def test_encoders_that_were_armed_in_vain_move_no_frame(detector_first):
    """As where a scan was given up before the detector was armed: every later frame had an earlier one's position."""
    publisher, context = DectrisPublisher(), zmq.Context()
    panda, unused = PandaAndMotion(context), context.socket(zmq.PULL)
    unused.connect(publisher.addresses["positions"].split("?")[0].replace("zmq:", "tcp:"))
    streams = streams_at(publisher.addresses["frames"], panda.addresses["positions"])
    consumer = Consumer(source(streams, scans=2))
    panda.begin()
    panda.positions(0, WHERE[50:90])
    panda.end(40, last=False)
    end = time.monotonic() + 60
    while consumer.live.streams.get("positions", {}).get("received", 0) < 40:
        assert time.monotonic() < end
        time.sleep(0.01)
    for scan in range(2):
        if not detector_first:
            panda.begin()
        publisher.begin(f"scan {scan}")
        if detector_first:
            while consumer.live.began is None or consumer.live.began.name != f"scan {scan}":
                assert time.monotonic() < end
                time.sleep(0.01)
            panda.begin()
        time.sleep(0.2)  # what is armed is so before the first frame is taken: two sockets, read by two threads
        for number in range(30):
            publisher.frame(number, COUNTS[0])
        panda.positions(0, WHERE[10 * scan : 10 * scan + 30])
        panda.end(30, last=scan == 1)
        publisher.end(30, last=scan == 1)
        consumer.until(30 * (scan + 1))
    consumer.over()
    publisher.close()
    panda.close()
    unused.close(0)
    context.term()
    assert consumer.error is None
    y = gathered(consumer.chunks, "position_y")
    np.testing.assert_allclose(y, np.concatenate([WHERE[:30, 0], WHERE[10:40, 0]]), atol=1e-15)
    said = consumer.live.streams
    assert said["positions"]["dropped"] == {GIVEN_UP: 40}
    assert said["frames"]["lost"] == 0
    adds_up(consumer.live)


def test_short_scans_that_came_during_a_pause_of_the_receiving_process_keep_their_positions():
    """As on a machine that swaps: two threads read then what has come, and one of them was ahead by scans."""
    publisher = DectrisPublisher()
    consumer = Consumer(of(publisher, scans=6))
    for scan in range(6):
        publisher.begin(f"line {scan}")
        time.sleep(0.05)
        for number in range(30):
            publisher.frame(number, COUNTS[0])
            publisher.position(number, WHERE[number + 10 * scan])
        publisher.end(30, last=scan == 5)
        if scan == 0:
            consumer.until(30)
            os.kill(consumer.live.receiver_pid, signal.SIGSTOP)
    time.sleep(0.3)
    os.kill(consumer.live.receiver_pid, signal.SIGCONT)
    consumer.over()
    publisher.close()
    assert consumer.error is None
    scan, number = np.divmod(gathered(consumer.chunks, "frame"), 10**9)
    assert len(scan) == 180
    np.testing.assert_allclose(gathered(consumer.chunks, "position_y"), WHERE[number + 10 * scan, 0], atol=1e-15)
    assert consumer.live.streams["positions"]["dropped"] == {}
    adds_up(consumer.live)


@pytest.mark.parametrize("armed_again", [False, True])
def test_a_run_that_was_lost_goes_on_in_the_scan_that_it_was_in(armed_again):
    """stream2 names a series once only, when it is armed; a series that is armed anew is another scan."""
    publisher = DectrisPublisher()
    lost = Consumer(of(publisher))
    publisher.begin("pores")
    send(publisher, 0, 10)
    lost.until(10)
    lost.live.close()
    lost.over()
    again = of(publisher)
    again.after(["gravel", "pores"])
    consumer = Consumer(again)
    if armed_again:
        publisher.begin("pores")
    send(publisher, 10 - 10 * armed_again, 40)
    publisher.end(40, last=True)
    consumer.over()
    publisher.close()
    assert consumer.error is None
    ids = gathered(consumer.chunks, "frame")
    first = 2 * 10**9 if armed_again else 10**9 + 10
    assert sorted(ids.tolist()) == list(range(first, first + len(ids)))
    assert len(ids) == 40 if armed_again else 30
    assert {chunk.attrs["scan"] for chunk in consumer.chunks} == {"pores"}
    adds_up(consumer.live)


@pytest.mark.parametrize("late", [True, False])
def test_positions_that_stop_for_a_while(late):
    """Where they come late all the same the frames wait for them; where they never come the frames are set aside."""
    publisher = DectrisPublisher()
    consumer = Consumer(of(publisher, wait_s=60.0 if late else 0.5, give_up_s=90.0))
    publisher.begin("gravel")
    send(publisher, 0, 20)
    send(publisher, 20, 40, positions=False)
    consumer.until(20)
    if late:
        for number in range(20, 40):
            publisher.position(number, WHERE[number])
    send(publisher, 40, 60)
    publisher.end(60, last=True)
    consumer.over()
    publisher.close()
    frames = consumer.live.streams["frames"]
    assert frames["joined"] == (60 if late else 40)
    if not late:
        [reason] = frames["dropped"]
        assert reason.startswith("no positions")
        assert reason.endswith("in a gap too wide to interpolate")
        assert consumer.live.frames_dropped == 20
    adds_up(consumer.live)


@pytest.mark.parametrize(("said", "real"), [(1, 10), (10, 9)])
def test_a_wrong_number_of_samples_is_no_position(said, real):
    publisher = DectrisPublisher(samples=real)
    positions = publisher.addresses["positions"].replace(f"samples={real}", f"samples={said}")
    publisher.addresses["positions"] = positions
    consumer = Consumer(of(publisher))
    publisher.begin("gravel")
    send(publisher, 0, 20)
    publisher.end(20, last=True)
    consumer.over()
    publisher.close()
    found = f"positions: found {20 * real} samples for 20 frames, {real} for each, expected {said}"
    assert found in str(consumer.error)
    assert f"give samples={real}" in str(consumer.error)


def torn(publisher: DectrisPublisher, counts: np.ndarray):
    """An image whose payload is damaged."""
    shape, values = publisher.encoded(counts).value
    algorithm, size, payload = values.value.value
    damaged = cbor2.CBORTag(values.value.tag, [algorithm, size, payload[:20] + bytes(len(payload) - 20)])
    return cbor2.CBORTag(40, [shape, cbor2.CBORTag(values.tag, damaged)])


def test_a_first_frame_that_cannot_be_decompressed_is_counted_as_later_ones_are():
    publisher = DectrisPublisher()
    consumer = Consumer(of(publisher))
    publisher.begin("gravel")
    publisher.send(0, torn(publisher, COUNTS[0]))
    publisher.position(0, WHERE[0])
    send(publisher, 1, 30)
    publisher.end(30, last=True)
    consumer.over()
    publisher.close()
    assert consumer.error is None
    assert sorted(gathered(consumer.chunks, "frame").tolist()) == list(range(1, 30))
    assert consumer.live.frames_dropped == 1
    adds_up(consumer.live)


def test_a_run_in_which_no_frame_could_be_read_says_what_kept_them_from_it():
    publisher = DectrisPublisher()
    frames = publisher.addresses["frames"] + "?channel=threshold_2"
    consumer = Consumer(source(streams_at(frames, publisher.addresses["positions"]), end_s=1.0))
    publisher.begin("gravel")
    send(publisher, 0, 5)
    consumer.over()
    publisher.close()
    assert "the others were unreadable: an image with the channels threshold_1, expected threshold_2" in str(
        consumer.error
    )


@pytest.mark.parametrize("least_counts", [0.0, 1.0])
def test_frames_that_cannot_be_decompressed_are_dropped_with_their_reason(least_counts):
    """Frames are decompressed when they are taken, or where their counts judge the beam: the figures add up."""
    publisher = DectrisPublisher()
    consumer = Consumer(of(publisher, beam=BeamSettings(least_counts=least_counts)))
    publisher.begin("gravel")
    send(publisher, 0, 30)
    for number in range(30, 35):
        publisher.position(number, WHERE[number])
        publisher.send(number, torn(publisher, COUNTS[0]))
    send(publisher, 35, 60)
    publisher.end(60, last=True)
    consumer.over()
    publisher.close()
    assert consumer.error is None
    ids = gathered(consumer.chunks, "frame")
    assert sorted(ids.tolist()) == [*range(30), *range(35, 60)]
    np.testing.assert_array_equal(gathered(consumer.chunks, "counts"), COUNTS[ids % len(COUNTS)])
    frames = consumer.live.streams["frames"]
    assert [why.partition(":")[0] for why in frames["dropped"]] == ["damaged"]
    assert sum(frames["dropped"].values()) == 5 == consumer.live.frames_dropped
    adds_up(consumer.live)


def test_the_last_word_of_positions_is_waited_for_once_all_frames_are_joined():
    """Ten samples of each frame, one expected: every frame has one, that of another. Only the end says so."""
    frames = [Frame(k, COUNTS[k], time.time()) for k in range(8)]
    slow = (Began("scan"), Samples(0, WHERE[:8]), Samples(8, WHERE[8:80]), Ended(8))
    streams = Streams(
        frames=Told(records_=(Began("scan"), *frames, Ended(last=True))), positions=Told(records_=slow, rest_s=1.0)
    )
    with pytest.raises(RuntimeError, match=r"found 80 samples for 8 frames, .* give samples=10"):
        list(source(streams).chunks())


def test_the_end_of_a_scan_goes_out_when_all_frames_are_judged_or_when_the_source_is_closed():
    """While the beam is away; the frames' positions come late."""
    publisher, orders = DectrisPublisher(), []

    def apply(decision) -> None:
        orders.append((len(decision.positions), decision.stop))
        if len(orders) == 1:
            for number in range(3):
                publisher.frame(number, 0 * COUNTS[0])

    publisher.steered_by(apply)
    streams = streams_at(*(publisher.addresses[name] for name in ("frames", "positions", "motion")))
    live = source(streams, beam=BeamSettings(least_counts=1.0))
    consumer, end = Consumer(live), time.monotonic() + 60
    publisher.begin("gravel")
    live.apply(asked(3, stop=True))
    while live.streams.get("frames", {}).get("waiting") != 3 or live.streams["frames"]["outstanding"]:
        assert time.monotonic() < end, live.streams
        time.sleep(0.05)
    time.sleep(0.2)
    assert orders == [(3, False)]
    for number in range(3):
        publisher.position(number, WHERE[number])
    while len(orders) < 2:
        assert time.monotonic() < end, live.streams
        time.sleep(0.05)
    live.close()
    consumer.over()
    publisher.close()
    assert orders == [(3, False), (1, False), (0, True)]


@dataclass
class InTurn:
    """A stream of what it is given, each at its place among those of all streams."""

    given: dict
    """By place."""
    turn: list

    def records(self, stopped):
        for place, one in self.given.items():
            while self.turn[0] < place:
                time.sleep(1e-4)
            yield one
            self.turn[0] += 1


@pytest.mark.parametrize("speed", ["0", "1", "1000"])
def test_streams_that_are_played_keep_step_by_the_file(tmp_path, speed):
    """Encoders are armed again for each scan: those that are ahead by one would have given the scan before up."""
    said = []
    for scan in range(3):
        where = WHERE[20 * scan : 20 * scan + 20]
        said += [("positions", Began(None, 0, {ARMED: True})), ("frames", Began(f"scan {scan}"))]
        for k in range(20):
            said += [("positions", Samples(k, where[k : k + 1])), ("frames", Frame(k, COUNTS[0], 0.0))]
        said += [("positions", Ended(20)), ("frames", Ended(20, last=scan == 2))]
    turn = [0]
    streams = {
        name: InTurn({place: one for place, (whose, one) in enumerate(said) if whose == name}, turn)
        for name in ("positions", "frames")
    }
    record(
        streams, tmp_path / "a.tape", threading.Event(), {"positions": "zmq://pc:1?y=y&x=x", "frames": "dectris://d"}
    )
    tape = f"play:{tmp_path / 'a.tape'}?speed={speed}"
    live = source(streams_at(tape, tape), scans=3)
    chunks = list(live.chunks())
    ids = gathered(chunks, "frame")
    numbers = ids % 10**9 + 20 * (ids // 10**9)
    assert sorted(numbers.tolist()) == list(range(60))
    np.testing.assert_array_equal(gathered(chunks, "position_y"), WHERE[numbers, 0])
    assert live.frames_dropped == 0


def test_frames_that_come_before_a_scan_is_gone_on_with_count_as_lost():
    """As while a probe is found from the first frames of a scan that is not steered."""
    positions = Told(records_=(Began("scan"), Samples(0, WHERE), Ended(100)))

    def of_numbers(first: int, last: int, **settings) -> LiveSource:
        frames = [Frame(number, COUNTS[0], time.time()) for number in range(first, last)]
        told = (Began(None, None) if first else Began("scan"), *frames, Ended(last=True))
        return source(Streams(frames=Told(records_=told), positions=positions), **settings)

    begun = of_numbers(0, 40)
    assert sum(chunk.sizes["frame"] for chunk in begun.chunks()) == 40
    assert begun.goes_on == Began("scan", 40)
    live = of_numbers(70, 100, going_on=begun.goes_on)
    chunks = list(live.chunks())
    assert {chunk.attrs["scan"] for chunk in chunks} == {"scan"}
    assert gathered(chunks, "frame").tolist() == list(range(70, 100))
    assert live.streams["frames"]["lost"] == live.frames_dropped == 30
    steered = loop()
    steered.began = Began("scan")
    assert steered.goes_on == Began("scan", None)


def test_a_detector_that_is_armed_again():
    publisher = DectrisPublisher()
    consumer = Consumer(of(publisher))
    for part in range(3):  # no end of the series before
        publisher.begin(f"scan {part}")
        send(publisher, 0, 10)
        end = time.monotonic() + 60
        while consumer.live.streams.get("frames", {}).get("received", 0) < 10 * (part + 1):
            assert time.monotonic() < end, consumer.live.streams  # a detector that measures is not armed for the next
            time.sleep(0.01)
    publisher.end(10, last=True)
    consumer.over()
    publisher.close()
    assert [chunk.attrs["scan"] for chunk in consumer.chunks if chunk.sizes["frame"]][-1] == "scan 2"
    assert consumer.live.streams["frames"]["joined"] == 30
    adds_up(consumer.live)


def test_a_scan_that_begins_at_once_after_the_last_one_is_left_out():
    """As on a beamline that does not know of the run."""
    streams = {
        "positions": (Began(None, 0, {ARMED: True}), Samples(0, WHERE[:8]), Ended(8), Began(None, 0, {ARMED: True})),
        "frames": (
            *(Began("one"), *(Frame(k, COUNTS[k], 0.0) for k in range(8)), Ended()),
            *(Began("two"), *(Frame(k, COUNTS[k], 0.0) for k in range(8)), Ended(), Began("three")),
        ),
    }
    told = {name: Told(records_=records) for name, records in streams.items()}
    live = source(Streams(**told), scans=1, end_s=30.0)
    chunks = list(live.chunks())
    assert {chunk.attrs["scan"] for chunk in chunks} == {"one"}
    assert gathered(chunks, "frame").tolist() == list(range(8))
    assert live.streams["frames"]["dropped"] == {BEYOND: 8}
    assert live.frames_dropped == 0
    adds_up(live)


def test_nothing_is_measured_before_the_streams_listen():
    live = loop(connects_s=0.7)
    live.apply(asked(3, stop=True))
    assert sum(chunk.sizes["frame"] for chunk in live.chunks()) == 3
    assert live.frames_dropped == 0


def test_a_stream_that_fails_ends_the_run_with_its_sentence():
    live = loop(broken_at=3)
    live.apply(asked(10))
    with pytest.raises(RuntimeError, match="frames: found the cable pulled out"):
        list(live.chunks())
    refused = loop(reach=0.0)
    refused.apply(asked(3))
    with pytest.raises(RuntimeError, match="motion: found a position beyond"):
        list(refused.chunks())


def test_a_receiving_process_that_is_killed_ends_the_run_with_a_sentence():
    live = loop()
    live.apply(asked(10))
    chunks = live.chunks()
    next(chunks)
    os.kill(live.receiver_pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"receiving process gone \(exit code -9\)"):
        list(chunks)


def test_a_receiving_process_that_is_stuck_is_ended_with_a_sentence(monkeypatch):
    """As in a library that does not come back, and lets no other thread run meanwhile."""
    publisher = DectrisPublisher()
    consumer = Consumer(of(publisher))
    publisher.begin("gravel")
    send(publisher, 0, 10)
    consumer.until(10)
    monkeypatch.setattr(live, "STUCK_S", 1.0)  # not before: to start may take longer
    send(publisher, 10, 20)
    consumer.until(20)
    pid = consumer.live.receiver_pid
    os.kill(pid, signal.SIGSTOP)
    consumer.over()
    publisher.close()
    assert "found the receiving process silent for 1 s" in str(consumer.error)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_silent_detector_gives_up_positions_and_then_ends_the_run():
    streams = Streams(frames=Silent(), positions=Silent(), motion=LoopMotion())
    live = source(streams, wait_s=0.1, give_up_s=0.3, end_s=2.0)
    live.apply(asked(5))
    again = threading.Timer(1.5, live.apply, [asked(2)])  # as a campaign does when its positions are given up
    again.start()
    with pytest.raises(RuntimeError, match=r"found no frame for \d+ s \(none came at all\)"):
        list(live.chunks())
    again.join()
    assert live.frames_dropped == 7


def test_a_motion_server_that_answers_too_late_has_refused_nothing():
    """It may measure all the same: what does not come is given up in time."""
    context, orders, answered = zmq.Context(), queue.SimpleQueue(), []
    socket = context.socket(zmq.REP)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    motion = ZmqMotion(address=f"tcp://127.0.0.1:{port}", answer_s=0.3)
    carrier = Carrier(motion, orders, threading.Event(), lambda *one: answered.append(one), lambda *_: None)
    thread = threading.Thread(target=carrier.run)
    thread.start()
    for n in (2, 3):
        orders.put(Order(WHERE[:n], None, False))
        assert socket.poll(5000)
        socket.recv()
        if n == 2:
            socket.send(b'{"queued": 2}')
    orders.put(None)
    thread.join(10)
    context.destroy(linger=0)
    (first, later) = answered
    assert first == (2, 0, None)
    assert later[:2] == (3, 0)
    assert "found no answer from the motion server" in str(later[2])


def test_another_protocol_is_refused_by_name():
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    consumer = Consumer(source(streams_at(f"dectris://127.0.0.1:{port}", f"zmq://127.0.0.1:{port}?y=y&x=x")))
    end = time.monotonic() + 60
    while consumer.is_alive():  # two clients there get half of them each, once both are there
        assert time.monotonic() < end
        with contextlib.suppress(zmq.Again):  # nobody is there yet, or any more
            socket.send(b'{"htype":"dheader-1.0","series":6}', zmq.NOBLOCK)
        consumer.join(0.05)
    context.destroy(linger=0)
    assert "frames: found Dectris stream1 (dheader-1.0), expected stream2" in str(consumer.error)


@pytest.mark.parametrize(
    ("library", "extra"), [("zmq", "dectris"), ("cbor2", "dectris"), ("p4p.client.thread", "epics")]
)
def test_a_library_that_is_not_there_is_named_with_its_extra(library, extra, monkeypatch):
    from steering.sources import dectris, pva, zmq_socket

    frames = pva.PvaFrames(pv="SIM:image").records(threading.Event())
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"pip install 'steering\[{extra}\]'"):
        {"zmq": zmq_socket.zmq, "cbor2": dectris.cbor, "p4p.client.thread": lambda: next(frames)}[library]()


def test_receiving_needs_no_torch():
    import subprocess

    program = (
        "import sys, steering.sources.receiver as r, steering.sources.addresses; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
