"""Frames without the beam are set aside by their own counts or by a monitor, and measured again."""

from __future__ import annotations

import numpy as np
import pytest

from steering.sources.beam import NO_BEAM, Beam, BeamSettings
from steering.sources.join import Joiner
from steering.sources.motion import Order
from steering.sources.plan import Plan
from steering.sources.streams import FRAMES, Companion, Joined
from steering.sources.window import Window
from tests.loop_beamline import Silent

LIGHT, DARK = np.full((4, 4), 10, np.uint16), np.zeros((4, 4), np.uint16)
DARK[0, 0] = np.iinfo(np.uint16).max  # a bad pixel is no light
MONITOR = "monitor"


def judging(*, steered=True, **settings) -> Beam:
    return Beam(BeamSettings(again_s=2.0, **settings), positions="positions", monitor=MONITOR, steered=steered)


def joined(counts, y, x, monitor=1.0) -> Joined:
    values = {"positions": np.array([y, x]), MONITOR: np.array([monitor])}
    return Joined(0, 0, (counts, 0.0), values, 0.0, {})


def order(positions, dwell=None, *, stop=False) -> Order:
    return Order(np.array(positions, float).reshape(-1, 2), dwell, stop)


def test_what_is_missed_is_asked_for_again_where_it_was_decided():
    beam = judging(least_counts=50)
    asked = order([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], np.array([0.1, 0.2, 0.3]))
    assert beam.ask(asked) == [asked]
    assert beam.judge(joined(LIGHT, 0.01, 0.0)) == ""
    assert beam.judge(joined(DARK, 1.02, 0.0)) == NO_BEAM
    assert beam.judge(joined(DARK, 1.98, 0.0)) == NO_BEAM
    assert beam.due(0.0, outstanding=1) == []  # what is asked for will tell
    [again] = beam.due(0.0, outstanding=0)
    np.testing.assert_array_equal(again.positions, asked.positions[1:2])
    np.testing.assert_array_equal(again.dwell, [0.2])
    assert beam.judge(joined(DARK, 1.0, 0.0)) == NO_BEAM
    assert beam.due(1.0, outstanding=0) == []
    assert len(beam.due(2.0, outstanding=0)) == 1
    assert beam.judge(joined(LIGHT, 2.0, 0.0)) == ""
    [again] = beam.due(2.1, outstanding=0)
    np.testing.assert_array_equal(again.positions, asked.positions[1:2])
    assert (beam.missed, beam.again) == (0, 3)


def test_the_end_of_a_scan_waits_for_what_was_missed_and_later_orders_for_it():
    beam = judging(least_counts=50)
    [first] = beam.ask(order([[1.0, 0.0]], stop=True))
    assert not first.stop
    assert beam.ask(order([[2.0, 0.0]], stop=True)) == []
    assert beam.judge(joined(DARK, 1.0, 0.0)) == NO_BEAM
    [again] = beam.due(0.0, outstanding=0)
    assert not again.stop
    assert beam.due(0.1, outstanding=1) == []
    assert beam.judge(joined(LIGHT, 1.0, 0.0)) == ""
    stop, then = beam.due(0.2, outstanding=0)
    assert stop.stop
    assert not len(stop.positions)
    assert then.positions.tolist() == [[2.0, 0.0]]
    assert not then.stop
    beam.judge(joined(LIGHT, 2.0, 0.0))
    assert [one.stop for one in beam.due(0.3, outstanding=0)] == [True]
    beam.ask(order([[3.0, 0.0]], stop=True))
    beam.ask(order([[4.0, 0.0]]))
    assert [(len(one.positions), one.stop) for one in beam.ends()] == [(0, True)]  # nothing more is measured
    assert beam.ends() == []
    unwatched = Beam(BeamSettings(), positions="positions", monitor=None, steered=True)
    asked = order([[1.0, 0.0]], stop=True)
    assert unwatched.ask(asked) == [asked]


def test_a_monitor_decides_where_it_is_asked_and_a_scan_that_is_over_gives_up():
    beam = judging(least_monitor=0.5)
    beam.ask(order([[0.0, 0.0]]))
    assert beam.judge(joined(DARK, 0.0, 0.0)) == ""  # an absorber, say
    assert beam.judge(joined(LIGHT, 0.0, 0.0, monitor=0.4)) == NO_BEAM
    beam.scan_over()
    assert (beam.missed, beam.given_up) == (0, 1)
    streams = {"frames": Silent(), "companions": ((Companion(name="positions", width=2), Silent()),), "motion": None}
    with pytest.raises(ValueError, match="expected its stream as well"):
        Plan(**streams, window=Window(size=16), beam=BeamSettings(least_monitor=1.0))
    with pytest.raises(ValueError, match="expected 0 or more counts"):
        BeamSettings(least_counts=-1)


def test_the_end_of_a_scan_that_the_beamline_has_ended_does_not_end_the_next_one():
    beam = judging(least_counts=50)
    beam.ask(order([[1.0, 0.0]], stop=True))
    assert beam.judge(joined(DARK, 1.0, 0.0)) == NO_BEAM
    beam.ask(order([[2.0, 0.0]]))  # waits for that end
    assert [(one.positions.tolist(), one.stop) for one in beam.ended()] == [([[2.0, 0.0]], False)]
    beam.scan_over()
    assert beam.judge(joined(LIGHT, 2.0, 0.0)) == ""
    assert beam.due(1.0, outstanding=0) == []
    assert beam.ends() == []
    assert beam.ended() == []


def test_figures_add_up_with_frames_that_are_set_aside():
    beam = judging(steered=False, least_counts=50)
    joiner = Joiner([Companion(name="positions", width=2)], judge=beam.judge)
    joiner.begin(0)
    for number in range(10):
        joiner.sample("positions", 0, number, [0.0, 0.0], 0.0)
        joiner.frame(0, number, (DARK if number in (3, 4) else LIGHT, 0.0), 0.0)
    taken = joiner.take(4)
    frames, samples = joiner.counters[FRAMES], joiner.counters["positions"]
    assert [one.number for one in taken] == [0, 1, 2, 5]
    assert frames.dropped == {NO_BEAM: 2}
    for counters, name in ((frames, FRAMES), (samples, "positions")):
        assert counters.received == counters.joined + sum(counters.dropped.values()) + joiner.waiting(name)
    assert beam.missed == 0  # nobody can be asked
