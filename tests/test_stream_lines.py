"""What is said of a source's streams, and when."""

from __future__ import annotations

import pytest

from steering.campaign import Campaign, ChunkArrived, Command, SourceEnded, decode, encode
from steering.runner.describe import describe
from steering.runner.ending import refuse_nothing
from steering.runner.folder import RunFolder
from steering.runner.stream_lines import report, stream_lines, troubled
from steering.view.status import status_lines


def figures(received, *, silent_s=0.1, waiting=0, outstanding=0, **more):
    return {
        "received": received,
        "joined": received - waiting,
        "waiting": waiting,
        "dropped": {},
        "lost": 0,
        "interpolated": 0,
        "silent_s": silent_s,
        "outstanding": outstanding,
        **more,
    }


SILENT = {"frames": figures(512, waiting=212), "positions": figures(300, silent_s=4.0)}


def test_a_silent_stream_is_named_with_the_frames_that_wait_for_it():
    assert stream_lines(SILENT) == [
        "frames: 512 received, 212 frames wait",
        "positions: silent for 4 s, 212 frames wait",
    ]
    lost = figures(90, lost=3, dropped={"repeat": 2}, interpolated=1)
    assert stream_lines({"frames": lost}) == ["frames: 90 received, 3 lost, 2 dropped (repeat), 1 interpolated"]
    assert stream_lines({"positions": figures(0, silent_s=None)}) == ["positions: nothing came yet"]


def test_events_are_few_and_one_comes_at_once_where_a_stream_falls_silent():
    running = {"frames": figures(100), "positions": figures(100)}
    first = report(0.0, running, None)
    assert first is not None
    assert describe(first) is None
    more = {"frames": figures(200), "positions": figures(200)}
    assert report(1.0, more, first) is None
    assert report(11.0, more, first) is not None
    assert report(11.0, running, first) is None
    event = report(1.0, SILENT, first)
    assert event is not None
    assert describe(event) == "positions: silent for 4 s, 212 frames wait"
    assert decode(encode(event)) == event
    assert report(0.0, {}, None) is None
    # Nothing is asked for and nothing waits: a pause is no trouble.
    pause = {name: figures(100, silent_s=60.0) for name in running}
    assert describe(report(50.0, pause, None)) is None


def test_a_stream_of_which_nothing_ever_came_is_in_trouble_once_it_had_time_to_begin():
    never = figures(0, silent_s=None)
    for streams in (
        {"frames": figures(90, waiting=90), "positions": never},
        {"frames": figures(0, silent_s=None, outstanding=5), "positions": never},
    ):
        young, old = [{name: {**one, "listens_s": s} for name, one in streams.items()} for s in (3.0, 11.0)]
        assert troubled(young) == ()
        assert troubled(old) == tuple(name for name, one in old.items() if not one["received"])
    assert troubled({"frames": {**never, "listens_s": 60.0}}) == ()  # nothing is expected


def test_a_run_that_ends_by_itself_without_a_frame_fails_with_what_its_streams_brought():
    dropped = {"frames": figures(5, dropped={"no positions within 5 s": 5}), "positions": figures(0, silent_s=None)}
    campaign = Campaign()
    campaign.handle(SourceEnded(time=1.0))
    assert campaign.finished
    with pytest.raises(RuntimeError, match=r"5 dropped \(no positions within 5 s\); positions: 0 received"):
        refuse_nothing(campaign, dropped)
    measured, stopped = Campaign(), Campaign()
    measured.handle(ChunkArrived(time=0.5, scan="a", frame_ids=(0,)))
    stopped.handle(Command(time=0.5, name="stop"))
    for one in (measured, stopped):
        one.handle(SourceEnded(time=1.0))
        refuse_nothing(one, dropped)


def test_the_status_of_a_run_shows_its_streams(tmp_path):
    folder = RunFolder.create(tmp_path / "run", __file__)
    folder.append_event(encode(report(0.0, SILENT, None)))
    lines = [line.split(None, 1)[1] for line in status_lines(folder) if line.strip().startswith("stream")]
    assert lines[0].startswith("frames: silent for ")
    assert lines[1].startswith("positions: silent for ")
    assert lines[1].endswith("212 frames wait")
