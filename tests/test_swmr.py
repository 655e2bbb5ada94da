"""Following a file that is being written: fill rows are never data, and the end is noticed."""

from __future__ import annotations

import threading

import h5py
import numpy as np
import pytest

from steering.sources.streams import Began, Ended, Frame, Samples
from steering.sources.swmr import Followed, SwmrFrames, SwmrPositions

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
