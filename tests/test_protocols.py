"""Every live protocol, against its own publisher: all frames come whole and where they were measured, and it steers."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from steering.records import Decision
from tests.serving import gathered
from tests.test_receiver import COUNTS, WHERE, WINDOW, Consumer, adds_up, source

pytestmark = pytest.mark.slow
pytest.importorskip("p4p")

from steering.sources.addresses import motion_at, streams_at  # noqa: E402
from steering.sources.beam import BeamSettings  # noqa: E402
from steering.sources.listening import listen  # noqa: E402
from steering.sources.motion import Unmeasured  # noqa: E402
from steering.sources.streams import FRAMES  # noqa: E402
from steering.sources.tape import record  # noqa: E402


def publisher(protocol: str, folder: Path):
    if protocol == "dectris":
        from served.dectris import DectrisPublisher

        return DectrisPublisher(samples=3)
    if protocol == "swmr":
        from served.swmr import SwmrPublisher

        return SwmrPublisher(folder, shape=(WINDOW, WINDOW))
    from served.pva import PvaPublisher

    served = PvaPublisher(compression="bslz4" if protocol == "pva bslz4" else None)
    if protocol in ("pva readbacks", "pva table"):  # positions in place of the frames' attributes
        served.addresses["positions"] = served.addresses[protocol.partition(" ")[2]]
    return served


PROTOCOLS = pytest.mark.parametrize("protocol", ["dectris", "pva", "pva bslz4", "swmr"])


def live(served, **settings):
    addresses = served.addresses
    return source(streams_at(addresses["frames"], addresses["positions"], addresses["motion"]), **settings)


def decision(positions) -> Decision:
    return Decision(positions=positions, reasons=("test",) * len(positions))


class Beamline:
    """Measures at once what is asked for over the protocol; the beam is away for the frames in `dark`."""

    def __init__(self, served, frames: int, dark: range = range(0)) -> None:
        self.served, self.frames, self.measured, self.dark = served, frames, [], dark
        self._turn = threading.Lock()
        served.begin("gravel")
        served.steered_by(self.apply)

    def apply(self, decision) -> None:
        with self._turn:
            for position in decision.positions:
                if len(self.measured) < self.frames:
                    number = len(self.measured)
                    self.served.position(number, position)
                    self.served.frame(number, COUNTS[number % len(COUNTS)] * (number not in self.dark))
                    self.measured.append(position)
            if decision.stop or len(self.measured) == self.frames:
                self.served.end(len(self.measured), last=True)
                self.frames = -1


@pytest.mark.parametrize("protocol", ["dectris", "pva", "pva bslz4", "pva readbacks", "pva table", "swmr"])
def test_what_is_decided_is_measured_and_every_frame_comes_whole(protocol, tmp_path):
    served = publisher(protocol, tmp_path)
    consumer = Consumer(live(served))
    beamline = Beamline(served, 90)
    for part in np.split(WHERE, 10):  # the last one beyond the end: nothing of it is lost
        consumer.live.apply(decision(part))
    consumer.over()
    served.close()
    assert consumer.error is None
    ids = gathered(consumer.chunks, "frame")
    numbers = ids - ids.min()
    assert sorted(numbers.tolist()) == list(range(90))
    where = np.stack([gathered(consumer.chunks, "position_y"), gathered(consumer.chunks, "position_x")], axis=1)
    np.testing.assert_allclose(where, WHERE[:90][numbers], atol=1e-10)
    np.testing.assert_allclose(where, np.array(beamline.measured)[numbers], atol=1e-10)
    np.testing.assert_array_equal(gathered(consumer.chunks, "counts"), COUNTS[numbers % len(COUNTS)])
    assert consumer.live.frames_dropped == 0
    adds_up(consumer.live)


def test_what_was_measured_without_the_beam_is_set_aside_and_measured_again(tmp_path):
    """While the beam is away one position is tried now and then; when it is back all that was missed is measured, where
    it was decided and for as long."""
    served = publisher("dectris", tmp_path)
    consumer = Consumer(live(served, beam=BeamSettings(least_counts=COUNTS.sum((1, 2)).min() / 2, again_s=0.05)))
    beamline = Beamline(served, 200, dark=range(30, 63))
    dwell = np.linspace(0.1, 0.2, 60)
    consumer.live.apply(Decision(positions=WHERE[:60], reasons=("test",) * 60, dwell=dwell, stop=True))
    consumer.over()
    served.close()
    assert consumer.error is None
    where = np.stack([gathered(consumer.chunks, "position_y"), gathered(consumer.chunks, "position_x")], axis=1)
    np.testing.assert_allclose(where[np.lexsort(where.T[::-1])], WHERE[:60], atol=1e-10)
    frames = consumer.live.streams["frames"]
    assert frames["dropped"] == {"without beam": 33}
    assert frames["measured_again"] == 33 == len(beamline.measured) - 60
    assert consumer.live.frames_dropped == 0
    adds_up(consumer.live)


def test_motors_respect_their_limits_and_go_back(tmp_path):
    served = publisher("pva", tmp_path)
    consumer = Consumer(live(served))
    Beamline(served, 3)
    consumer.live.apply(decision(WHERE[1:4]))
    consumer.over()
    assert [float(motor.current()) for motor in served.motors] == [0.0, 0.0]
    refused = source(streams_at(served.addresses["frames"], served.addresses["positions"], served.addresses["motion"]))
    refused.apply(decision(np.array([[1.0, 0.0]])))
    with pytest.raises(RuntimeError, match=r"motion: found positions .* for SIM:y, expected them within its limits"):
        list(refused.chunks())
    served.close()


def test_motors_and_exposure_go_back_while_a_frame_is_taken(tmp_path):
    """A frame may take longer than anybody waits for the end of a run; and a position without a dwell has the
    detector's own."""
    served, stopped = publisher("pva", tmp_path), threading.Event()
    taken: list[float | None] = []

    def take(decision) -> None:
        taken.append(None if decision.dwell is None else float(decision.dwell[0]))
        if taken[-1] != 30.0:
            served.missed()

    served.steered_by(take)
    motion = motion_at(served.addresses["motion"]).connected(stopped)
    motion.measure(WHERE[1:2], np.array([2.5]), False)
    motion.measure(WHERE[2:3], None, False)
    assert taken == [2.5, None]
    thread = threading.Thread(target=motion.measure, args=(WHERE[3:5], np.array([30.0, 30.0]), False))
    thread.start()
    end = time.monotonic() + 60
    while len(taken) < 3:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [float(motor.current()) for motor in served.motors] != [0.0, 0.0]
    stopped.set()
    thread.join(5.0)
    assert not thread.is_alive()
    motion.close()
    assert [float(motor.current()) for motor in served.motors] == [0.0, 0.0]
    assert float(served.dwell.current()) == 0.0
    assert len(taken) == 3
    served.close()


def test_motors_go_back_where_the_receiving_process_is_told_to_end(tmp_path):
    """As by scancel, which reaches every process of a job."""
    served = publisher("pva", tmp_path)
    consumer = Consumer(live(served))
    Beamline(served, 100)
    consumer.live.apply(decision(WHERE[1:4]))
    consumer.until(3)
    os.kill(consumer.live.receiver_pid, signal.SIGTERM)
    consumer.over()
    assert "receiving process: found SIGTERM" in str(consumer.error)
    assert [float(motor.current()) for motor in served.motors] == [0.0, 0.0]
    served.close()


def test_motors_that_cannot_be_put_back_are_named(tmp_path, caplog):
    served = publisher("pva", tmp_path)
    consumer = Consumer(live(served))
    Beamline(served, 100)
    consumer.live.apply(decision(WHERE[1:2]))
    consumer.until(1)

    @served.motors[0].put
    def refuse(pv, operation) -> None:
        operation.done(error="interlock")

    consumer.live.close()
    consumer.over()
    assert consumer.error is None
    assert "motion: found no way to put back SIM:y at 0 (interlock), expected it" in caplog.text
    assert float(served.motors[1].current()) == 0.0
    served.close()


def test_a_measurement_that_breaks_off_says_how_much_is_left(tmp_path):
    served = publisher("pva", tmp_path)
    beamline, stopped = Beamline(served, 2), threading.Event()
    motion = motion_at(served.addresses["motion"]).connected(stopped)
    with pytest.raises(Unmeasured, match="the beamline is closed") as broken:
        motion.measure(WHERE[:5], None, False)
    assert broken.value.left == 3
    assert len(beamline.measured) == 2
    motion.close()
    served.close()


@PROTOCOLS
def test_a_dry_run_says_what_each_stream_sends(protocol, tmp_path):
    served = publisher(protocol, tmp_path)
    found = {}

    def hear() -> None:
        found.update(listen(streams_at(served.addresses["frames"], served.addresses["positions"]).named(), 4.0))

    listener = threading.Thread(target=hear)
    listener.start()
    served.begin("gravel")
    stopped = threading.Event()
    for number in range(15):
        stopped.wait(0.1)
        if not listener.is_alive():
            break  # nobody would take it
        served.position(number, WHERE[number])
        served.frame(number, COUNTS[0])
    listener.join()
    served.close()
    line = found[FRAMES].line()
    assert line.startswith("16 x 16 uint16, ")
    assert "/s, first number" in line
    assert found["positions"].count >= 2
    assert found["positions"].what.endswith("at first")


def test_a_recording_of_a_live_stream_is_a_source_like_the_stream(tmp_path):
    served = publisher("dectris", tmp_path)
    addresses, stopped = served.addresses, threading.Event()
    streams = streams_at(addresses["frames"], addresses["positions"])
    following = {FRAMES: streams.frames, "positions": streams.positions}
    addresses = {name: addresses[name] for name in following}
    recorder = threading.Thread(target=record, args=(following, tmp_path / "a.tape", stopped, addresses))
    recorder.start()
    served.begin("gravel")
    for number in range(40):
        served.position(number, WHERE[number])
        served.frame(number, COUNTS[number % len(COUNTS)])
    served.end(40, last=True)
    served.close()
    stopped.wait(1.0)
    stopped.set()
    recorder.join()
    tape = f"play:{tmp_path / 'a.tape'}?speed=0"
    consumer = Consumer(source(streams_at(tape, f"{tape}&samples=3")))
    consumer.over()
    assert consumer.error is None
    ids = gathered(consumer.chunks, "frame")
    assert sorted(ids.tolist()) == list(range(40))
    np.testing.assert_array_equal(gathered(consumer.chunks, "counts"), COUNTS[ids % len(COUNTS)])
    np.testing.assert_allclose(gathered(consumer.chunks, "position_y"), WHERE[ids, 0], atol=1e-12)
