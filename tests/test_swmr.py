"""Following a file that is being written: fill rows are never data, and the end is noticed."""

from __future__ import annotations

import os
import threading

import h5py
import numpy as np
import pytest

from steering.sources import swmr_file, swmr_rows
from steering.sources.addresses import frames_at, positions_at, streams_at
from steering.sources.streams import Began, Ended, Frame, Samples, Unreadable
from steering.sources.swmr import BEFORE, SwmrFrames, SwmrPositions
from steering.sources.swmr_rows import Followed, rows_of

SHAPE = (8, 8)


class Writer:
    """Writes as a beamline's writer does: rows appear before they hold anything."""

    def __init__(self, path, *, keys=True, finished=True, fill=np.nan):
        self.file = h5py.File(path, "w", libver="latest")
        many = {"chunks": (4,), "maxshape": (None,)}
        self.frames = self.file.create_dataset(
            "/entry/data/data", (0, *SHAPE), np.uint16, chunks=(1, *SHAPE), maxshape=(None, *SHAPE)
        )
        self.y = self.file.create_dataset("/entry/data/y", (0,), np.float64, fillvalue=fill, **many)
        self.x = self.file.create_dataset("/entry/data/x", (0,), np.float64, fillvalue=fill, **many)
        self.keys = self.file.create_dataset("/entry/uniqueKeys", (0,), np.int64, **many) if keys else None
        self.finished = self.file.create_dataset("/entry/scan_finished", (), np.int32) if finished else None
        self.file.swmr_mode = True

    def resize(self, n):
        for dataset in self.all():
            dataset.resize(n, axis=0)
            dataset.flush()

    def all(self):
        return [d for d in (self.frames, self.y, self.x, self.keys) if d is not None]

    def write(self, *rows, value=None):
        for row in rows:
            self.frames[row] = row + 1 if value is None else value
            self.y[row], self.x[row] = row, -row
            if self.keys is not None:
                self.keys[row] = row + 1
        for dataset in self.all():
            dataset.flush()

    def finish(self):
        self.finished[()] = 1
        self.finished.flush()


class Reader(threading.Thread):
    """Follows in a thread; `came` grows meanwhile."""

    def __init__(self, stream):
        super().__init__(daemon=True)
        self.stream, self.came, self.stopped = stream, [], threading.Event()
        self.turn = threading.Condition()
        self.start()

    def run(self):
        for record in self.stream.records(self.stopped):
            if record is not None:
                with self.turn:
                    self.came.append(record)
                    self.turn.notify_all()

    def numbers(self, count):
        """The numbers of the first so many frames."""
        with self.turn:
            assert self.turn.wait_for(lambda: len(self.frames()) >= count, 30), self.came
            return [frame.number for frame in self.frames()]

    def frames(self):
        return [record for record in self.came if isinstance(record, Frame)]

    def ended(self):
        self.join(30)
        assert not self.is_alive()
        assert isinstance(self.came[-1], Ended)


@pytest.mark.parametrize("keys", [True, False])
def test_rows_are_taken_when_they_are_written_and_never_before(tmp_path, keys):
    path = tmp_path / "scan.h5"
    writer = Writer(path, keys=keys)
    reader = Reader(SwmrFrames(where=Followed(file=str(path), skip_s=60)))
    writer.resize(6)
    writer.write(0, 1)
    assert reader.numbers(2) == [0, 1]
    writer.write(3)  # 2 is late, and 4, 5 are there in shape only
    assert reader.numbers(3) == [0, 1, 3]
    writer.write(2, 4)
    assert sorted(reader.numbers(5)) == [0, 1, 2, 3, 4]
    writer.finish()
    reader.ended()
    assert sorted(frame.number for frame in reader.frames()) == [0, 1, 2, 3, 4]  # row 5 was never written
    assert all((frame.counts == frame.number + 1).all() for frame in reader.frames())
    assert reader.came[0] == Began("scan")


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("missing", [64, 70, 300])
def test_any_number_of_rows_in_a_row_may_be_missing(tmp_path, keys, missing):
    """Those of a queue that ran over, or of a shutter that was closed: later ones are read, also before the end."""
    path, later = tmp_path / "scan.h5", [*range(50 + missing, 130 + missing)]
    writer = Writer(path, keys=keys)
    reader = Reader(SwmrFrames(where=Followed(file=str(path), skip_s=60)))
    writer.resize(1000)  # laid out beforehand
    writer.write(*range(50), *later)
    assert reader.numbers(130) == [*range(50), *later]
    writer.write(51, 49 + missing)  # late
    assert sorted(reader.numbers(132)[130:]) == [51, 49 + missing]
    writer.write(990, 999)
    writer.finish()
    reader.ended()
    assert sorted(reader.numbers(134)[132:]) == [990, 999]
    assert len(reader.frames()) == 134


def test_with_keys_a_frame_of_zeros_is_data(tmp_path):
    path = tmp_path / "scan.h5"
    writer = Writer(path)
    reader = Reader(SwmrFrames(where=Followed(file=str(path))))
    writer.resize(2)
    writer.write(0, value=0)
    assert reader.numbers(1) == [0]
    writer.finish()
    reader.ended()


def test_positions_in_a_file_of_their_own_and_a_total(tmp_path):
    path = tmp_path / "scan.h5"
    writer = Writer(path, keys=False, finished=False)
    where = Followed(file=str(path), total=5)
    reader = Reader(SwmrPositions(where=where, columns=("/entry/data/y", "/entry/data/x"), scale=(1e-6, -1e-6)))
    writer.resize(5)
    writer.write(0, 1, 2, 3, 4)
    reader.ended()
    samples = [record for record in reader.came if isinstance(record, Samples)]
    rows = np.concatenate([one.rows for one in samples])
    np.testing.assert_allclose(rows, 1e-6 * np.stack([np.arange(5), np.arange(5)], axis=1))


@pytest.mark.parametrize("fill", [np.nan, 0.0])
def test_half_of_a_position_is_none(tmp_path, fill):
    path = tmp_path / "scan.h5"
    writer = Writer(path, keys=False, fill=fill)
    where = Followed(file=str(path), skip_s=60)
    reader = Reader(SwmrPositions(where=where, columns=("/entry/data/y", "/entry/data/x"), scale=(1.0, 1.0)))
    writer.resize(4)
    writer.y[:], writer.x[3] = [5.0, 6.0, 7.0, 8.0], -8.0
    writer.y.flush(), writer.x.flush()
    with reader.turn:
        assert reader.turn.wait_for(lambda: len(reader.came) >= 2, 30)
    assert [(one.first, one.rows.tolist()) for one in reader.came[1:]] == [(3, [[8.0, -8.0]])]
    writer.x[1] = 2.0
    writer.x.flush()
    writer.finish()
    reader.ended()
    rows = {one.first: one.rows.tolist() for one in reader.came if isinstance(one, Samples)}
    assert rows.pop(1) == [[6.0, 2.0]]
    assert rows.pop(3) == [[8.0, -8.0]]
    assert rows == ({} if np.isnan(fill) else {0: [[5.0, 0.0]], 2: [[7.0, 0.0]]})  # 0 may be where it is


ATTRIBUTES = "/entry/instrument/NDAttributes/"
IDS = f"{ATTRIBUTES}NDArrayUniqueId"


def write_area(path, ids, **ids_as):
    """A file of areaDetector's HDF5 plugin: a row for each array that it wrote, and its attributes as datasets."""
    with h5py.File(path, "w", libver="latest") as file:
        ids = np.asarray(ids)
        many = {"chunks": (4,), "maxshape": (None,)}
        counts = np.broadcast_to(np.arange(1, len(ids) + 1, dtype=np.uint16)[:, None, None], (len(ids), *SHAPE))
        file.create_dataset("/entry/data/data", data=counts, chunks=(1, *SHAPE), maxshape=(None, *SHAPE))
        file.create_dataset(ids_as.get("at", IDS), data=ids, dtype=ids_as.get("dtype", np.int32), **many)
        for name, sign in (("y", 1.0), ("x", -1.0)):
            values = sign * np.arange(1, len(ids) + 1)
            file.create_dataset(f"/entry/detector/{name}", data=values, **many).attrs["NDAttrName"] = name
            file.create_dataset(f"/entry/scan/{name}", data=values, **many)


def read_area(path, options="", columns="/entry/detector"):
    """(number, row) of each frame, and (number, y) of each position, of a file that grows no more."""
    file = f"swmr:{path}?quiet=0{options}"
    streams = streams_at(file, f"{file}&y={columns}/y&x={columns}/x")
    frames = [one for one in streams.frames.records(threading.Event()) if isinstance(one, Frame)]
    samples = [one for one in streams.positions.records(threading.Event()) if isinstance(one, Samples)]
    rows = [(one.first + k, y) for one in samples for k, y in enumerate(one.rows[:, 0].tolist())]
    return [(one.number, int(one.counts[0, 0]) - 1) for one in frames], [(number, int(y) - 1) for number, y in rows]


@pytest.mark.parametrize("begin", [0, 1, 700])
def test_arrays_that_the_writer_dropped_shift_no_number(tmp_path, begin):
    path, numbers = tmp_path / "scan.h5", [0, 1, 3, 4, 6]
    write_area(path, [begin + number for number in numbers])
    expected = [(number, row) for row, number in enumerate(numbers)]
    assert read_area(path) == (expected, expected)
    by_row = [(row, row) for row in range(5)]
    assert read_area(path, "&number=none") == (by_row, by_row)
    # Columns that somebody else has written have their own rows.
    assert read_area(path, columns="/entry/scan") == (expected, by_row)
    assert read_area(path, f"&first={begin}") == (expected, expected)
    if begin:  # numbers as the scan's own, of which the first were dropped
        later = [(number + 1, row) for number, row in expected]
        assert read_area(path, f"&first={begin - 1}") == (later, later)


def test_numbers_are_read_from_any_dataset(tmp_path):
    path = tmp_path / "scan.h5"
    write_area(path, [5.0, 7.0], at="/entry/n", dtype=np.float64)
    assert read_area(path, "&number=/entry/n") == ([(0, 0), (2, 1)],) * 2
    assert read_area(path, "&number=/entry/n", "/entry/scan") == ([(0, 0), (2, 1)],) * 2
    assert read_area(path) == ([(0, 0), (1, 1)],) * 2


def test_a_row_waits_for_its_number(tmp_path):
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w", libver="latest") as file:
        rows = {"chunks": (1, *SHAPE), "maxshape": (None, *SHAPE)}
        frames = file.create_dataset("/entry/data/data", data=np.ones((4, *SHAPE), np.uint16), **rows)
        ids = file.create_dataset(IDS, (4,), np.int32, chunks=(1,), maxshape=(None,))
        file.swmr_mode = True
        reader = Reader(SwmrFrames(where=Followed(file=str(path), total=5, skip_s=60)))
        assert reader.numbers(1) == [0]  # the first, whatever it is called
        ids[0], ids[1] = 11, 12
        ids.flush()
        assert reader.numbers(2) == [0, 1]
        ids[3] = 15
        ids.flush()
        assert reader.numbers(3) == [0, 1, 4]
        ids[2] = 14
        frames.resize(5, axis=0)
        frames[4] = 1
        ids.resize(5, axis=0)
        ids[4] = 16
        for one in (ids, frames):
            one.flush()
        reader.ended()
        assert sorted(reader.numbers(5)) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([0, 0, 0, 0], "", "found 3 rows without a number in .*NDArrayUniqueId, expected one for each: give number="),
        ([7, 7, 7], "", "found the number 7 of row 1 in .*, expected whole ones of 8 or more: give number="),
        ([3, 2, 4], "", "found the number 2 of row 1"),
        ([-1, 1, 2], "", "found the number -1 of row 0"),
        ([3, 4], "&first=4", "found the number 3 of row 0"),
        ([1, 2**50], "", "found the number 1.1259e.15 of row 1"),
        ([1, 2], "&number=/entry/none", "expected /entry/none among them"),
        ([1, 2], "&number=/entry/text", "found /entry/text .*, expected real numbers"),
    ],
)
def test_a_dataset_that_numbers_no_frames_is_said(tmp_path, ids, options, words):
    path = tmp_path / "scan.h5"
    write_area(path, ids, dtype=np.int64)
    with h5py.File(path, "a") as file:
        file["/entry/text"] = np.array([b"a", b"b"])
    with pytest.raises(ValueError, match=words):
        read_area(path, options)


def test_numbers_of_frames_spread_over_scan_axes_are_not_asked(tmp_path):
    """There a row is the place of the frame, also where a snake comes back."""
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["/entry/data/data"] = np.arange(1, 5, dtype=np.uint16).reshape(2, 2, 1, 1) * np.ones((1, 1, *SHAPE))
        file["/entry/NDAttributes/NDArrayUniqueId"] = np.array([[1, 2], [4, 3]])
        file["/entry/detector/y"] = file["/entry/detector/x"] = np.arange(1.0, 5.0).reshape(2, 2)
    assert read_area(path) == ([(row, row) for row in range(4)],) * 2


@pytest.mark.parametrize("axes", [(60,), (60, 1), (12, 5), (3, 4, 5), (1, 60)])
def test_rows_of_scan_axes_are_read_in_their_order(tmp_path, axes):
    frames = np.arange(60 * 6).reshape(60, 2, 3)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        whole = file.create_dataset("d", data=frames.reshape(*axes, 2, 3))
        numbers = file.create_dataset("n", data=np.arange(60).reshape(axes))
        for first, last in ((0, 60), (0, 1), (3, 4), (4, 6), (5, 25), (17, 60), (59, 60)):
            np.testing.assert_array_equal(swmr_file.read_rows(whole, first, last, 2), frames[first:last])
            np.testing.assert_array_equal(swmr_file.read_rows(numbers, first, last, 0), np.arange(first, last))


def test_a_look_reads_the_keys_of_the_rows_that_it_looks_at(tmp_path, monkeypatch):
    """And not those of all rows before them, which took more time the longer the scan was."""
    keys = []

    def read_rows(found, first, last, inner):
        keys.append(last - first if "Keys" in found.name else 0)
        return swmr_file.read_rows(found, first, last, inner)

    monkeypatch.setattr(swmr_rows, "read_rows", read_rows)
    with h5py.File(tmp_path / "scan.h5", "w", libver="latest") as file:
        file["/entry/data/data"] = np.ones((10, 100, 1, 1), np.uint16)
        file["/entry/solstice_scan/keys/uniqueKeys"] = np.arange(1, 1001).reshape(10, 100)
        file["/entry/solstice_scan/scan_finished"] = 1
    looks = rows_of(tmp_path / "scan.h5", Followed(file=""), ("/entry/data/data",), 2, threading.Event())
    assert sum(len(run.numbers) for run in looks if run is not None) == 1000
    assert 0 < max(keys) <= 64


def test_options_of_numbers_that_exclude_one_another_are_refused():
    with pytest.raises(ValueError, match="found first=1 with number=none"):
        frames_at("swmr:a.h5?number=none&first=1")
    with pytest.raises(ValueError, match="found samples=2 with number or first"):
        positions_at("swmr:a.h5?y=/y&x=/x&samples=2&number=/n")


def test_a_file_for_each_scan_and_one_that_falls_silent(tmp_path):
    first, second = Writer(tmp_path / "scan-0.h5"), Writer(tmp_path / "scan-1.h5", finished=False)
    for writer in (first, second):
        writer.resize(2)
        writer.write(0, 1)
    first.finish()
    first.file.close()  # a closed file is read like one that grows
    reader = Reader(SwmrFrames(where=Followed(file=str(tmp_path / "scan-*.h5"), quiet_s=0.3)))
    reader.numbers(4)
    with reader.turn:
        assert reader.turn.wait_for(lambda: sum(isinstance(record, Ended) for record in reader.came) == 2, 30)
    reader.stopped.set()
    reader.join(30)
    kinds = [type(record).__name__ for record in reader.came]
    assert kinds == ["Began", "Frame", "Frame", "Ended"] * 2
    assert [record.name for record in reader.came if isinstance(record, Began)] == ["scan-0", "scan-1"]


def test_a_file_is_looked_at_when_it_changes(tmp_path, monkeypatch):
    """Not only now and then, by which every frame would come that much later."""
    monkeypatch.setattr(swmr_rows, "ANYWAY_S", 600.0)
    writer = Writer(tmp_path / "scan.h5")
    reader = Reader(SwmrFrames(where=Followed(file=str(tmp_path / "scan.h5"))))
    writer.resize(4)
    for row in range(4):
        writer.write(row)
        reader.stopped.wait(0.05)  # longer than a tick of the file's clock
        os.utime(tmp_path / "scan.h5")
        assert reader.numbers(row + 1)[-1] == row
    writer.finish()
    reader.stopped.wait(0.05)
    os.utime(tmp_path / "scan.h5")
    reader.ended()


def test_a_pause_ends_no_scan_of_a_file_that_says_when_it_is_finished(tmp_path):
    path = tmp_path / "scan.h5"
    writer = Writer(path)
    reader = Reader(SwmrFrames(where=Followed(file=str(path), quiet_s=0.1)))
    writer.resize(2)
    writer.write(0)
    reader.numbers(1)
    reader.stopped.wait(0.5)
    writer.write(1)
    assert reader.numbers(2) == [0, 1]
    writer.finish()
    reader.ended()


def test_a_steered_scan_passes_over_files_that_nobody_writes_to_any_more(tmp_path):
    old, armed = Writer(tmp_path / "scan-0.h5"), Writer(tmp_path / "scan-1.h5")
    for writer in (old, armed):
        writer.resize(2)
    old.write(0, 1, value=7)
    old.finish()
    old.file.close()
    file = f"swmr:{tmp_path}/scan-*.h5"
    streams = streams_at(file, f"{file}?y=/entry/data/y&x=/entry/data/x", motion="zmq://127.0.0.1:31003")
    readers = [Reader(streams.frames), Reader(streams.positions)]
    for reader in readers:
        with reader.turn:
            assert reader.turn.wait_for(lambda came=reader.came: len(came) == 2, 30), reader.came
    armed.write(0, 1)
    assert readers[0].numbers(2) == [0, 1]
    armed.finish()
    for reader in readers:
        with reader.turn:
            assert reader.turn.wait_for(lambda came=reader.came: isinstance(came[-1], Ended), 30), reader.came
        reader.stopped.set()
        reader.join(30)
        assert reader.came[:2] == [Unreadable(BEFORE)] * 2
    assert [frame.counts.max() for frame in readers[0].frames()] == [1, 2]
    assert sum(len(one.rows) for one in readers[1].came if isinstance(one, Samples)) == 2


def test_a_file_that_is_renamed_is_followed_on(tmp_path):
    path = tmp_path / "scan.h5"
    writer = Writer(path)
    reader = Reader(SwmrFrames(where=Followed(file=str(path))))
    writer.resize(4)
    writer.write(0)
    reader.numbers(1)
    path.rename(tmp_path / "moved.h5")
    writer.write(1, 2, 3)
    writer.finish()
    reader.ended()
    assert reader.numbers(4) == [0, 1, 2, 3]


def test_what_is_no_such_file_is_said(tmp_path):
    path = tmp_path / "scan.h5"
    Writer(path).file.close()
    with pytest.raises(ValueError, match=r"found the datasets /entry/data/data.*, expected /entry/frames among them"):
        list(SwmrFrames(where=Followed(file=str(path), quiet_s=0.2), data="/entry/frames").records(threading.Event()))
    other = tmp_path / "other.h5"
    other.write_bytes(b"not HDF5")
    with pytest.raises(OSError, match="cannot be followed"):
        list(SwmrFrames(where=Followed(file=str(other), quiet_s=0.1)).records(threading.Event()))
