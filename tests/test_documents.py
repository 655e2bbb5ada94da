"""Documents of strangers: any JSON in the place of a document's parts ends in a clear error, or is passed over."""

from __future__ import annotations

import json
import re
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from steering.sources.addresses import frames_at, positions_at, streams_at
from steering.sources.streams import Began, Ended, Frame, Samples, Unreadable

RANGES = {"indices": {"start": 0, "stop": 1}, "seq_nums": {"start": 1, "stop": 2}}
IMAGE = {"dtype": "array", "shape": [4, 4], "external": "STREAM:", "source": ""}
NUMBER = {"dtype": "number", "shape": [], "source": ""}
KEYS = {"one": IMAGE, "y": NUMBER, "x": NUMBER}
DOCUMENTS = [
    ["start", {"uid": "a", "time": 0.0, "scan_id": 7, "sample": "gravel"}],
    ["descriptor", {"uid": "b", "run_start": "a", "name": "primary", "data_keys": KEYS}],
    ["stream_resource", {"uid": "c", "data_key": "one", "mimetype": "application/x-hdf5", "uri": "file://localhost/no.h5",
                         "parameters": {"dataset": "d"}}],
    ["stream_datum", {"uid": "c/0", "stream_resource": "c", "descriptor": "b", **RANGES}],
    ["event", {"uid": "e", "descriptor": "b", "seq_num": 1, "data": {"y": 1.0, "x": 2.0}}],
    ["stop", {"uid": "f", "run_start": "a", "num_events": {"primary": 1}}],
]  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.tuples(st.integers(0, len(DOCUMENTS) - 1), st.integers(0, 9), anything), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_documents_with_any_parts_raise_nothing_else(changes):
    documents = json.loads(json.dumps(DOCUMENTS))
    for which, part, value in changes:
        document = documents[which][1]
        document[list(document)[part % len(document)]] = value
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "documents.jsonl"
        lines.write_text("".join(json.dumps(one) + "\n" for one in documents))
        frames = frames_at(f"bluesky:{lines}")
        _, positions = positions_at(f"bluesky:{lines}?y=y&x=x&unit=mm")
        for stream in (frames, positions):
            said = "found "
            try:
                list(replace(stream, documents=replace(stream.documents, patience_s=0.0)).records(threading.Event()))
            except (ValueError, OSError) as error:
                said = str(error)
            assert "found" in said, said


@pytest.fixture
def many(tmp_path):
    """Lines of a run with documents that name 200 rows each, of frames and positions; and what these are."""
    h5py = pytest.importorskip("h5py")
    frames, where = np.arange(3200, dtype=np.uint16).reshape(200, 4, 4), np.arange(400.0).reshape(2, 200)
    with h5py.File(tmp_path / "rows.h5", "w", libver="latest") as file:
        file["d"], file["y"], file["x"] = frames, *where
    columns = {"dtype": "number", "shape": [], "external": "STREAM:", "source": ""}
    documents = [
        DOCUMENTS[0],
        ["descriptor", {**DOCUMENTS[1][1], "data_keys": {"one": IMAGE, "y": columns, "x": columns}}],
    ]
    for key, dataset in (("one", "d"), ("y", "y"), ("x", "x")):
        place = {"uri": f"file://localhost{tmp_path / 'rows.h5'}", "parameters": {"dataset": dataset}, "data_key": key}
        ranges = {"indices": {"start": 0, "stop": 200}, "seq_nums": {"start": 1, "stop": 201}}
        documents.append(["stream_resource", {**DOCUMENTS[2][1], **place, "uid": key}])
        documents.append(["stream_datum", {**DOCUMENTS[3][1], **ranges, "stream_resource": key}])
    return [json.dumps(one) for one in [*documents, DOCUMENTS[5]]], frames, where.T


def read(tmp_path, lines):
    """What frames and positions of these documents say."""
    (tmp_path / "a.jsonl").write_text("".join(line + "\n" for line in lines))
    where = f"bluesky:{tmp_path / 'a.jsonl'}"
    streams = streams_at(where, f"{where}?y=y&x=x").named()
    return streams, {name: list(stream.records(threading.Event())) for name, stream in streams.items()}


def test_a_run_that_is_sent_once_more_is_no_other_one(tmp_path, many):
    lines, frames, where = many
    _, found = read(tmp_path, lines * 2)
    numbers = [one.number for one in found["frames"] if isinstance(one, Frame)]
    assert numbers == list(range(200))
    np.testing.assert_array_equal([one.counts for one in found["frames"] if isinstance(one, Frame)], frames)
    np.testing.assert_array_equal([one.rows[0] for one in found["positions"] if isinstance(one, Samples)], where)
    for records in found.values():
        _, *said = [one for one in records if not isinstance(one, Frame | Samples)]
        assert [(type(one), one.last) for one in said] == [(Ended, False), (Ended, True)]


def test_a_run_that_has_no_frames_and_positions_together_is_named(tmp_path, many):
    lines, *_ = many
    other = [line.replace('"uid": "a"', '"uid": "z"').replace('"run_start": "a"', '"run_start": "z"') for line in lines]
    other = [line.replace('"one"', '"two"').replace('"y": {', '"stage": {') for line in other]
    _, found = read(tmp_path, [*other, *lines])
    words = "a run with the data keys stage, two, x, expected frames, y, x in one of its streams"
    for records in found.values():
        assert records[0] == Unreadable(words)
        assert isinstance(records[1], Began)


def renamed(lines, run):
    """The documents of a run with another uid."""
    return [re.sub('"(uid|run_start|descriptor)": "([abf])"', rf'"\1": "\g<2>{run}"', line) for line in lines]


def test_a_run_within_a_run_or_of_another_engine_takes_nothing_of_it(tmp_path, many):
    lines, frames, where = many
    inner = (
        ["start", {"uid": "n", "time": 0.0}],
        ["descriptor", {"uid": "m", "run_start": "n", "data_keys": {"t": NUMBER}}],
    )
    event = ["event", {"descriptor": "m", "seq_num": 1, "uid": "k", "time": 0.0, "data": {"t": 1.0}}]
    within = [json.dumps(one) for one in (*inner, event)]
    _, found = read(tmp_path, [*lines[:4], *within, *lines[4:], json.dumps(["stop", {"uid": "o", "run_start": "n"}])])
    np.testing.assert_array_equal([one.counts for one in found["frames"] if isinstance(one, Frame)], frames)
    np.testing.assert_array_equal([one.rows[0] for one in found["positions"] if isinstance(one, Samples)], where)
    for records in found.values():
        said = [one for one in records if not isinstance(one, Frame | Samples | Began)]
        words = "a run with the data keys t, expected frames, y, x in one of its streams"
        assert said == [Ended(said[0].frames), Unreadable(words), Ended(last=True)]


def test_a_run_that_never_ended_makes_room_for_the_next_one_and_is_said(tmp_path, many):
    lines, *_ = many
    _, found = read(tmp_path, [*lines[:4], *renamed(lines, "2")])
    assert len([one for one in found["frames"] if isinstance(one, Frame)]) == 400
    for records in found.values():
        kinds = [one for one in records if not isinstance(one, Frame | Samples)]
        assert [one.header["run"] for one in kinds if isinstance(one, Began)] == ["a", "a2"]
        words = "the rest of a run that had not ended when another with the same data keys began"
        assert kinds[1:3] == [Ended(), Unreadable(words)]


def test_a_run_that_was_aborted_is_said(tmp_path, many):
    lines, *_ = many
    stop = ["stop", {**DOCUMENTS[5][1], "exit_status": "abort", "reason": "the\nuser"}]
    _, found = read(tmp_path, [*lines[:-1], json.dumps(stop)])
    for records in found.values():
        said = [one for one in records if isinstance(one, Unreadable | Ended)]
        assert said[0] == Unreadable("the end of a run that did not succeed: abort, the user")
        assert [type(one) for one in said[1:]] == [Ended, Ended]


def test_frames_that_the_documents_of_ophyd_name_are_refused(tmp_path, many):
    lines, *_ = many
    with pytest.raises(ValueError, match="found one in files that the documents resource and datum name, expected"):
        read(tmp_path, [line.replace("STREAM:", "FILESTORE:") for line in lines])


def test_a_monitor_may_be_in_a_stream_of_its_own_and_a_baseline_is_no_monitor(tmp_path, many):
    lines, *_ = many
    streams = {"baseline": ("b", [7.0, 8.0]), "intensity": ("i", [3.0, 4.0, 5.0])}
    said = []
    for name, (uid, values) in streams.items():
        keys = {"i0": {"dtype": "number", "shape": [], "source": ""}}
        said.append(["descriptor", {**DOCUMENTS[1][1], "uid": uid, "name": name, "data_keys": keys}])
        said += [
            ["event", {"descriptor": uid, "seq_num": k, "uid": f"{uid}{k}", "time": 0.0, "data": {"i0": value}}]
            for k, value in enumerate(values, 1)
        ]
    said = [json.dumps(one).replace('"event", {', '"event", {"timestamps": {}, "filled": {}, ') for one in said]
    (tmp_path / "a.jsonl").write_text("".join(line + "\n" for line in [lines[0], *said, *lines[1:]]))
    where = f"bluesky:{tmp_path / 'a.jsonl'}"
    named = streams_at(where, f"{where}?y=y&x=x", None, f"{where}?value=i0").named()
    found = {name: list(stream.records(threading.Event())) for name, stream in named.items()}
    assert len([one for one in found["frames"] if isinstance(one, Frame)]) == 200
    monitor = [(one.first, one.rows.item()) for one in found["monitor"] if isinstance(one, Samples)]
    assert monitor == [(0, 3.0), (1, 4.0), (2, 5.0)]


def test_rows_that_one_document_names_are_read_and_recorded_in_parts(tmp_path, many):
    """All rows of a document together may be more than memory, or a block of a recording, holds."""
    lines, frames, _ = many
    streams, found = read(tmp_path, lines)
    for name, stream in streams.items():
        messages = [one for one in stream.messages(threading.Event()) if one is not None]
        rows = [shape[0] for one in messages for _, shape in one.fields.get("rows", [])]
        assert (max(rows), sum(rows)) == (64, 200 if name == "frames" else 400)
        decode = stream.decoder()
        again = [record for message in messages for record in decode(message)]
        assert len(again) == len(found[name])
        for one, other in zip(again, found[name], strict=True):
            if isinstance(one, Frame):
                assert one.number == other.number
                np.testing.assert_array_equal(one.counts, frames[one.number])
            elif isinstance(one, Samples):
                assert one.first == other.first
                np.testing.assert_array_equal(one.rows, other.rows)
            else:
                assert one == other
