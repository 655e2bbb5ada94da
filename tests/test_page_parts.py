"""Laws of what feeds the live page: only what changed travels, and put together it is what a new viewer gets."""

import json
import time

import numpy as np
import pytest

from steering.inference import LiveImage, ScanReader
from steering.inference.scan_reader import Picture
from steering.inference.small_image import NOTHING
from steering.ptychography import Canvas
from steering.records import Field
from steering.runner.folder import RunFolder
from steering.view.live.access import Access, Visitor
from steering.view.live.course import MOST_POINTS, Course, Series
from steering.view.live.folder_image import image_of
from steering.view.live.message import message, opened
from steering.view.live.tail import Tail
from steering.view.live.warnings import warnings
from steering.view.status import silence
from tests.test_inference import CANVAS, GEOMETRY
from tests.test_readers import WEIGHT, filled, thing

BIG = Canvas.around(Field(-600, 600, -40, 40), 32)  # made smaller for people


def unpacked(change, maps):
    """What the page's script does with a change: the maps (y, x) by name, NaN where nothing is known."""
    head, payload = change.header, change.payload
    (rows, columns), side = head["grid"], head["side"]
    for name, tiles in head["maps"].items():
        four = maps.setdefault(name, np.full((rows, columns, side, side), np.nan))
        count = tiles["count"]
        place = np.frombuffer(payload, np.int32, count, tiles["place"])
        low, high = np.frombuffer(payload, np.float32, 2 * count, tiles["scale"]).reshape(-1, 2).T[..., None, None]
        pixels = np.frombuffer(payload, np.uint8, count * side**2, tiles["pixels"]).reshape(count, side, side)
        values = np.where(pixels == NOTHING, np.nan, low + pixels / (NOTHING - 1) * (high - low))
        four[place // columns, place % columns] = values
    return maps


def flat(four, shape):
    return four.swapaxes(1, 2).reshape(four.shape[0] * four.shape[2], -1)[: shape[0], : shape[1]]


@pytest.mark.parametrize("canvas", [CANVAS, BIG], ids=["whole", "smaller"])
def test_changes_one_after_the_other_give_the_image_of_a_new_viewer(canvas):
    live = LiveImage("a", canvas, WEIGHT, GEOMETRY, (thing(), CANVAS))
    reader = ScanReader(live)
    filled(live, 20, 1)
    change = reader.change()
    maps, known = unpacked(change, {}), change.known
    assert change.header["whole"]
    assert max(change.header["shape"]) <= 512
    for step in range(3):
        filled(live, 5, 10 + step, version=step)
        change = reader.change(known)
        assert not change.header["whole"]
        assert (change.header["frames"]["first"], change.header["frames"]["count"]) == (20 + 5 * step, 5)
        known, maps = change.known, unpacked(change, maps)
    anew = reader.change()
    assert anew.header["frames"]["count"] == 35
    for name, values in unpacked(anew, {}).items():
        np.testing.assert_allclose(maps[name], values, atol=1e-5, err_msg=name)
    shown = flat(maps["amplitude"], anew.header["shape"])
    factor = round(anew.header["pixel"] / GEOMETRY.object_pixel)
    exact = np.asarray(Picture(live, factor).fields()["amplitude"])
    np.testing.assert_allclose(shown, exact, atol=np.nanmax(exact) / 250)
    assert reader.change(anew.known).payload == b""  # nothing has changed


def test_the_image_of_an_ended_scan_comes_from_its_folder(tmp_path):
    live = LiveImage("a", CANVAS, WEIGHT, GEOMETRY, (thing(), CANVAS))
    filled(live, 20, 1)
    folder = RunFolder.create(tmp_path / "run")
    folder.write_object("a", ScanReader(live).dataset())
    image = folder.objects()["a"]
    change = image_of(image, "a")
    shown = flat(unpacked(change, {})["phase"], change.header["shape"])
    known = np.isfinite(image["phase"].values)
    np.testing.assert_array_equal(np.isfinite(shown), known)
    np.testing.assert_allclose(shown[known], image["phase"].values[known], atol=0.02)
    head, payload = opened(message({"run": "night", "loss": float("nan")}, {}, change))
    assert head["facts"] == {"run": "night", "loss": None}
    assert (head["image"]["frames"]["count"], payload) == (20, change.payload)


def test_a_source_that_brings_nothing_is_known_from_the_log_until_it_brings_frames():
    course, now = Course(0.0), time.time()
    chunk = {"event": "ChunkArrived", "time": now - 9.0, "scan": "a", "frame_ids": [1]}
    course.take([chunk, {"event": "SourceSilent", "time": now, "since": now - 8.0}])
    assert silence(course.of_source).endswith("(8 s)")
    course.take([{"event": "SourceReopened", "time": now, "reason": "cut off", "attempt": 2, "seconds": 1.0}])
    assert silence(course.of_source).endswith(", opened again 2 times: cut off")
    course.take([chunk])
    assert silence(course.of_source) == ""


def test_rows_that_a_viewer_has_do_not_travel_again():
    series = Series("time", "value")
    for k in range(5):
        series.append(k, k * k)
    revision = series.revision
    assert series.since(revision, 3) == {"first": 3, "columns": {"time": [3, 4], "value": [9, 16]}}
    assert series.since(revision, 5) is None
    for k in range(5, MOST_POINTS + 1):
        series.append(k, 0)
    assert len(series) < MOST_POINTS
    assert series.since(revision, 5)["first"] == 0  # thinned: all of it
    assert (series.columns["time"][0], series.columns["time"][-1]) == (0, MOST_POINTS)


def test_the_log_is_drawn_as_it_grows_and_lines_of_others_do_no_harm(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    tail, course = Tail(folder), Course(100.0)
    assert tail.lines() == []
    lines = [
        {"event": "ModelPublished", "time": 101.0, "version": 1, "validation_error": 0.2, "validation_residual": 0.1},
        {"event": "DriftRaised", "time": "soon"},
        {"event": "DriftRaised"},
        {"event": "Command", "time": 101.5, "name": "limit", "area": [-2e-7, 2e-7, 0, 1e-6], "by": "bob"},
        {"event": "Command", "time": 102.0, "name": "veto", "by": "ada"},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n[1]\n{"event": "RunEn'
    (folder.path / "events.jsonl").write_text(text)
    course.take(tail.lines())
    with (folder.path / "events.jsonl").open("a") as log:
        log.write('ded", "time": 104.0, "status": "failed", "reason": "no beam"}\n')
    course.take(tail.lines())
    assert course.series["versions"].columns["time"] == [1.0]
    limited = "limit: y -2e-07 to 2e-07, x 0 to 1e-06, by bob"
    assert [words for _, words in course.log][-3:] == [limited, "veto, by ada", "the run failed: no beam"]


WAITS = ["ranks: 1 waits: Priority", "given up: found 3 jobs of trainer in a row that ended before their worker came"]


def test_what_is_wrong_is_said_the_worst_first():
    streams = {"detector": {"received": 5, "joined": 5, "waiting": 0, "dropped": {}, "lost": 0}}
    streams["detector"] |= {"silent_s": 9.0, "interpolated": 0}
    streams["frames"] = {**streams["detector"], "waiting": 4, "silent_s": 0.1}
    state = {"status": "running", "trouble": "no space", "drift": True, "residual": 0.3, "residual_expected": 0.1}
    said = warnings(
        {**state, "streams": streams, "paused": True}, waits=WAITS, source="silent since 3:00", silent_s=7.0
    )
    words = " | ".join(one["text"] for one in said)
    parts = ("no space", "7 s", "detector", "residual 0.300, 0.100 expected", "Priority", "Paused")
    for part in (*parts, "found 3 jobs", "The source is silent since 3:00"):
        assert part in words
    assert [one["kind"] for one in said] == sorted((one["kind"] for one in said), key=("alarm", "notice").index)
    assert warnings({"status": "running", "streams": {}}) == []


def test_a_token_is_one_visitors():
    access = Access()
    ada, bob = Visitor(name="ada", role="operator"), Visitor(name="bob", role="reader")
    tokens = [access.invite(ada), access.invite(bob)]
    assert [access.visitor(token) for token in tokens] == [ada, bob]
    assert access.visitor(None) is access.visitor("") is access.visitor(tokens[0] + "x") is None
    assert not any(token in repr(vars(access)) for token in tokens)
