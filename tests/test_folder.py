"""Laws of the run folder: every file whole or not there, and the folder says how the run ended."""

import contextlib
import itertools
import json
import pickle
import subprocess
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xarray as xr
import zarr

from steering.runner.folder import BALLAST_BYTES, RunFolder
from tests.ranks import killed_at_the_end


def image(value, size=8):
    return xr.Dataset(
        {
            "phase": (("y", "x"), np.full((size, size), value, np.float32)),
            "held_out": ("frame", np.arange(size) % 2 == 0),
        },
        coords={"y": ("y", np.arange(size) * 1e-9, {"units": "m"})},
    )


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "a" / "run")


def mounted(path, options):
    """Mount a tmpfs at path, or skip where that is not allowed."""
    path.mkdir()
    tried = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {tried.stderr.strip()}")
    return path


@pytest.fixture
def small_disk(tmp_path):
    path = mounted(tmp_path / "small", "size=512k")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path):
    with open(path / "filler", "wb", buffering=0) as filler:
        while True:
            try:
                filler.write(b"x" * 4096)
            except OSError:
                return


def test_a_new_folder_says_that_it_runs_and_keeps_the_workflow(tmp_path):
    (tmp_path / "w.py").write_text("def main(folder, arguments): ...\n")
    folder = RunFolder.create(tmp_path / "run", tmp_path / "w.py")
    assert folder.summary()["status"] == "running"
    assert (folder.path / "workflow.py").read_text() == (tmp_path / "w.py").read_text()
    assert folder.models.is_dir()
    assert RunFolder(folder.path).summary() == folder.summary()
    assert pickle.loads(pickle.dumps(folder)).path == folder.path


def test_create_takes_an_empty_folder_and_refuses_one_in_use(tmp_path):
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="found a folder with files in it, expected a new or empty one"):
        RunFolder.create(tmp_path / "empty")


@pytest.mark.parametrize("there", [False, True])
def test_of_runs_that_begin_in_one_folder_at_the_same_moment_one_has_it(tmp_path, there):
    for number in range(20):
        path = tmp_path / f"{number}" / "run"
        if there:
            path.mkdir(parents=True)
        together = threading.Barrier(4)

        def create(path=path, together=together):
            together.wait()
            return RunFolder.create(path).identity

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(create) for _ in range(4)]
        [mine] = [each.result() for each in asked if each.exception() is None]
        refused = {str(each.exception()) for each in asked if each.exception() is not None}
        assert refused == {f"{path}: found a folder with files in it, expected a new or empty one"}
        assert RunFolder(path).identity == mine
        assert sorted(one.name for one in path.iterdir()) == [".ballast", "models", "summary.json"]


def test_create_below_a_file_is_refused_with_advice(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="found a file where a folder is needed: choose another"):
        RunFolder.create(tmp_path / "file" / "deep" / "run")
    with pytest.raises(OSError, match="choose another"):
        RunFolder.create(tmp_path / "file")


def test_create_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        RunFolder.create(tmp_path / "new" / "run", tmp_path / "no_workflow.py")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        RunFolder(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no summary\.json in it, expected the folder of a run"):
        RunFolder(tmp_path)


def test_summary_merges_nested_figures_and_stays_json(folder):
    folder.write_summary({"phase_error": {"a": {"first": np.float32(1.5)}}, "scans": np.array(["a", "b"])})
    folder.write_summary({"phase_error": {"a": {"run_end": float("nan")}, "b": {"first": np.int64(2)}}})
    text = (folder.path / "summary.json").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["phase_error"] == {"a": {"first": 1.5, "run_end": None}, "b": {"first": 2}}
    assert strict["scans"] == ["a", "b"]
    assert strict["status"] == "running"


def test_events_keep_their_order_and_a_torn_line_is_left_out(folder):
    assert folder.events() == []
    for number in range(3):
        folder.append_event({"event": "Tick", "time": float(number), "frame_ids": np.arange(2), "x": (1, np.nan)})
    log = folder.path / "events.jsonl"
    log.write_bytes(log.read_bytes() + b'{"event": "Tick", "ti')
    assert [event["time"] for event in folder.events()] == [0, 1, 2]
    folder.append_event({"event": "Tick", "time": 3.0})
    events = folder.events()
    assert [event["time"] for event in events] == [0, 1, 2, 3]
    assert events[0] == {"event": "Tick", "time": 0, "frame_ids": [0, 1], "x": [1, None]}


def test_an_object_replaces_the_one_before_and_scans_keep_their_order(folder):
    folder.write_object("zinc", image(1))
    folder.write_object("a scan", image(2))
    folder.write_object("zinc", image(3, size=5))
    folder.write_summary({"scans": ["zinc", "a scan"]})
    objects = folder.objects()
    assert list(objects) == ["zinc", "a scan"]
    xr.testing.assert_identical(objects["zinc"], image(3, size=5))
    assert objects["a scan"].y.attrs["units"] == "m"
    assert sorted(path.name for path in (folder.path / "object.zarr").iterdir()) == ["a scan", "zarr.json", "zinc"]


def test_xarray_opens_the_objects_without_a_warning(folder):
    """By the plain calls of its manual. The metadata are what zarr itself would write."""
    assert folder.objects() == {}
    for scan, value in (("a", 1), ("b c", 2), ("a", 3)):
        folder.write_object(scan, image(value))
    path = folder.path / "object.zarr"
    with xr.open_datatree(path, engine="zarr", chunks=None) as tree, xr.open_datatree(path) as guessed:
        assert sorted(tree.children) == sorted(guessed.children) == ["a", "b c"]
        xr.testing.assert_identical(tree["a"].to_dataset().load(), image(3))
    with xr.open_zarr(path, group="b c", chunks=None) as opened:
        xr.testing.assert_identical(opened.load(), image(2))
    for place in ({"filename_or_obj": path, "group": "a"}, {"filename_or_obj": path / "a"}):
        with xr.open_dataset(**place, engine="zarr", chunks=None) as opened:
            xr.testing.assert_identical(opened.load(), image(3))
    ours = [json.loads(file.read_text()) for file in (path / "zarr.json", path / "a" / "zarr.json")]
    with warnings.catch_warnings(action="ignore"):  # that format 3 does not name consolidated metadata yet
        zarr.consolidate_metadata(path / "a")
        zarr.consolidate_metadata(path)
    theirs = [json.loads(file.read_text()) for file in (path / "zarr.json", path / "a" / "zarr.json")]
    assert ours[1] == theirs[1]
    assert _members(ours[0]) == _members(theirs[0])


def _members(root):
    """The consolidated metadata of a root, whose groups do not repeat their own."""
    found = root["consolidated_metadata"]["metadata"]
    return {name: {k: v for k, v in value.items() if k != "consolidated_metadata"} for name, value in found.items()}


def test_a_reader_sees_an_object_as_it_was_or_as_it_is(folder):
    """While it is replaced again and again, with ever another number of frames, by ours and by xarray's own calls."""
    folder.write_object("a", image(0, size=4))
    path, over, seen = folder.path / "object.zarr", threading.Event(), []

    def write():
        for turn in range(1, 20):
            folder.write_object("a", image(turn, size=4 + turn % 3))
        over.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not over.is_set():
            found = folder.objects()["a"]
            turn = int(found["phase"].values[0, 0])
            xr.testing.assert_identical(found, image(turn, size=4 + turn % 3))
            seen.append(turn)
            with contextlib.suppress(ValueError), xr.open_zarr(path, group="a", chunks=None) as opened:
                assert len(set(opened["phase"].values.ravel())) == 1
        writing.result()
    assert seen == sorted(seen)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 101, "é" * 51])
def test_a_scan_name_that_no_folder_can_have_is_refused(folder, name):
    with pytest.raises(ValueError, match="no slash, no leading dot"):
        folder.write_object(name, image(1))


def test_an_object_that_cannot_be_written_leaves_the_old_one(folder):
    folder.write_object("a", image(1))
    bad = image(2).assign(what=("frame", np.array([object()] * 8)))
    with pytest.raises(Exception, match=r".+"):
        folder.write_object("a", bad)
    xr.testing.assert_identical(folder.objects()["a"], image(1))
    assert not [path for path in folder.path.iterdir() if path.name.startswith((".new", ".old"))]


@pytest.mark.parametrize("status", ["finished", "failed", "interrupted"])
def test_the_end_is_in_the_summary_and_the_last_event(folder, status):
    folder.end(status, "because", traceback="trace")
    summary, last = folder.summary(), folder.events()[-1]
    assert (summary["status"], summary["reason"]) == (status, "because")
    assert summary["ended"] >= summary["started"]
    assert (last["event"], last["status"], last["traceback"]) == ("RunEnded", status, "trace")
    assert not (folder.path / ".ballast").exists()


def test_end_never_raises(folder, caplog):
    for path in folder.path.rglob("*"):
        if path.is_file():
            path.unlink()
    (folder.path / "models").rmdir()
    folder.path.rmdir()
    folder.end("failed", "the disk went away")
    assert "could not write down that the run failed (the disk went away)" in caplog.text


def test_an_unknown_ending_is_a_failure(folder):
    folder.end("done")
    assert folder.summary()["status"] == "failed"
    assert folder.summary()["reason"] == "done"


def test_a_full_disk_leaves_the_summary_whole_and_room_for_the_last_words(small_disk):
    folder = RunFolder.create(small_disk / "run")
    folder.write_object("a", image(1))
    folder.append_event({"event": "Tick", "time": 0.0})
    before = folder.summary()
    fill(small_disk)
    with pytest.raises(OSError, match="found a full disk, expected room for the run: free some space"):
        folder.write_summary({"notes": "x" * 100_000})
    with pytest.raises(OSError, match="found a full disk"):
        folder.write_object("a", image(2, size=300))
    with pytest.raises(OSError, match="found a full disk"):
        folder.append_event({"event": "Tick", "time": 1.0, "notes": "x" * 100_000})
    assert folder.summary() == before
    xr.testing.assert_identical(folder.objects()["a"], image(1))
    folder.end("failed", "the disk is full", traceback="trace " * 1000)
    assert (folder.summary()["status"], folder.summary()["reason"]) == ("failed", "the disk is full")
    assert [event["event"] for event in folder.events()] == ["Tick", "RunEnded"]


def test_no_folder_is_begun_on_a_full_disk(small_disk):
    fill(small_disk)
    with pytest.raises(OSError, match="found a full disk"):
        RunFolder.create(small_disk / "new" / "run")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_read_only_disk_is_refused_with_advice(tmp_path):
    path = mounted(tmp_path / "readonly", "ro,size=64k")
    try:
        with pytest.raises(OSError, match="found a read-only file system, expected one that can be written"):
            RunFolder.create(path / "run")
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def write_for_ever(begun, folder):
    begun.set()
    for n in itertools.count(1):
        folder.write_summary({"n": n, "filler": "x" * 200_000})
        folder.append_event({"event": "Tick", "time": n, "filler": "x" * 50_000})


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_whole_summary_and_readable_events(folder):
    for turn in range(3):
        with killed_at_the_end(write_for_ever, folder):
            until = time.monotonic() + 0.1 + 0.07 * turn
            while time.monotonic() < until:
                assert folder.summary()["status"] == "running"
        assert len(folder.summary().get("filler", "x" * 200_000)) == 200_000
        folder.append_event({"event": "Last", "time": 0})
        events = folder.events()
        assert events[-1]["event"] == "Last"
        assert all(len(event["filler"]) == 50_000 for event in events if event["event"] == "Tick")


def test_the_ballast_is_real(folder):
    assert (folder.path / ".ballast").stat().st_blocks * 512 >= BALLAST_BYTES
