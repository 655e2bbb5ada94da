"""Which scan an arming belongs to, whatever the order in which streams say theirs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from steering.sources.armings import Armings


def measured(armings: Armings) -> tuple[int, int]:
    """The scans of a frame and of a sample that come now."""
    return armings.frame(), armings.samples("panda")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.booleans(), st.booleans()), min_size=1, max_size=8))
@settings(deadline=None)
def test_armings_that_are_given_up_move_no_later_scan(scans):
    """Of each scan: whether the detector is armed first, how often the encoders are armed in vain before, whether these
    are stopped in order, and whether the encoders stop before the frames end."""
    armings = Armings(["panda"])
    for number, (detector_first, in_vain, stopped, early) in enumerate(scans):
        for _ in range(in_vain):
            armings.begins("panda", again=True)
            armings.samples("panda")
            if stopped or detector_first:
                armings.end("panda")
        if detector_first:
            armings.frames_begin()
            scan, given_up = armings.begins("panda", again=True)
        else:
            scan, given_up = armings.begins("panda", again=True)
            armings.frames_begin()
        assert (scan, given_up) == (number, in_vain > 0)
        assert measured(armings) == (number, number)
        for name in ("panda", "frames") if early else ("frames", "panda"):
            armings.end(name)
        assert armings.ended("panda", number)


@pytest.mark.parametrize("again", [False, True])
def test_a_stream_that_is_ahead_because_frames_are_held_back_is_followed(again):
    """As positions of files are, which are there all at once."""
    armings = Armings(["panda"])
    for number in range(3):
        scan, given_up = armings.begins("panda", again=again)
        assert (scan, given_up) == ((0, number > 0) if again else (number, False))
        armings.samples("panda")
        armings.end("panda")


def test_a_stream_that_has_missed_an_arming_catches_up():
    armings = Armings(["panda", "monitor"])
    for number in range(3):
        armings.frames_begin()
        if number != 1:
            assert armings.begins("panda", again=True) == (number, False)
            assert measured(armings) == (number, number)
            armings.end("panda")
        assert armings.samples("monitor") == number  # it never says that a scan begins


def test_encoders_that_are_armed_again_while_frames_come_are_of_the_next_scan():
    """Which frame their first sample is of is not known any more."""
    armings = Armings(["panda"])
    armings.begins("panda", again=True)
    armings.frames_begin()
    assert measured(armings) == (0, 0)
    assert armings.begins("panda", again=True) == (1, False)
    assert measured(armings) == (0, 1)
    assert armings.begins("panda", again=True) == (1, True)  # for the next scan
    armings.frames_begin()
    assert measured(armings) == (1, 1)


@given(st.integers(2, 5), st.lists(st.booleans(), max_size=60))
@settings(deadline=None)
def test_whichever_stream_is_read_first_samples_belong_to_the_frames_of_their_scan(scans, turns):
    """As after a pause of the receiver: all of it is there, and two threads read it. One that waits goes on once the
    other has nothing unread."""
    armings = Armings(["panda"])
    unread = {
        name: [(what, k) for k in range(scans) for what in ("began", "data", "ended")] for name in ("panda", "frames")
    }
    order = [("panda", "frames")[turn] for turn in turns] + ["panda", "frames"] * 6 * scans
    for name in order:
        if not unread[name]:
            continue
        what, scan = unread[name][0]
        if what == "began":
            if any(unread[other] for other in armings.behind(name, again=True)):
                continue
            mine = armings.frames_begin() if name == "frames" else armings.begins(name, again=True)[0]
        elif what == "ended":
            mine = armings.end(name, 1)
        else:
            mine = armings.frame() if name == "frames" else armings.samples(name)
        assert mine == scan
        unread[name].pop(0)
    assert not any(unread.values())


def test_an_arming_that_had_no_frame_needs_no_look_at_the_frames():
    armings = Armings(["panda"])
    assert armings.behind("panda", again=True) == []
    armings.begins("panda", again=True)
    assert armings.behind("panda", again=True) == []  # not ended
    armings.end("panda", 0)
    assert armings.behind("panda", again=True) == []
    assert armings.begins("panda", again=True) == (0, True)
    armings.end("panda", None)
    assert armings.behind("panda", again=True) == ["frames"]
    assert armings.behind("panda", again=False) == []


def test_a_companion_is_not_more_than_three_scans_ahead_of_frames_that_are_unread():
    armings = Armings(["panda"])
    armings.frames_begin()
    for scan in range(4):
        assert armings.behind("panda", again=False) == (["frames"] if scan == 3 else [])
        armings.begins("panda", again=False)
        armings.samples("panda")
        armings.end("panda", 1)
