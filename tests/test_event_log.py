"""Laws of the log of events: it never waits for the disk, it has no gap, and others may write to it too."""

import asyncio
import contextlib
import itertools
import threading
import time

import pytest

from steering.runner import event_log
from steering.runner.event_log import EventLog, open_log
from steering.runner.folder import RunFolder
from tests.ranks import killed_at_the_end
from tests.test_folder import fill, small_disk  # noqa: F401 - a fixture


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run")


@pytest.fixture
def slow(monkeypatch):
    """The log's file takes nothing before this is set."""
    ready, really = threading.Event(), event_log.open_log

    class Slow:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            ready.wait()
            return self.file.write(content)

    @contextlib.contextmanager
    def opened(folder):
        with really(folder) as file:
            yield Slow(file)

    monkeypatch.setattr(event_log, "open_log", opened)
    yield ready
    ready.set()


def numbers(folder):
    return [event["n"] for event in folder.events()]


def test_a_slow_disk_holds_nobody_up_and_nothing_is_lost(folder, slow):
    """Every append returns while the disk takes nothing; the lines then come whole and in order, another process's
    between them."""
    log = EventLog(folder)
    for n in range(2000):
        log.append({"event": ("ChunkArrived", "ModelPublished")[n % 2], "n": n})
    assert folder.events() == []
    folder.append_event({"event": "Last", "n": -1})
    slow.set()
    log.flush()
    assert numbers(folder) == [-1, *range(2000)]


def test_a_disk_that_takes_nothing_is_an_error_before_memory_is_full(folder, slow, monkeypatch):
    monkeypatch.setattr(event_log, "MOST_BYTES", 1000)
    log = EventLog(folder)
    taken = 0
    with pytest.raises(OSError, match="found a disk that takes no events"):  # noqa: PT012
        while True:
            log.append({"event": "ChunkArrived", "n": taken})
            taken += 1
    assert 10 < taken < 1000
    with pytest.raises(OSError, match="found a disk that takes no events"):  # the log has no gap
        log.append({"event": "ChunkArrived", "n": taken})


@pytest.mark.parametrize("kind", ["ChunkArrived", "ModelPublished"])
def test_events_reach_the_file_without_being_asked_for(folder, kind):
    log = EventLog(folder)
    log.append({"event": kind, "n": 1})
    while not folder.events():
        time.sleep(0.01)
    log.append({"event": "Last", "n": 2})
    log.flush()
    assert numbers(folder) == [1, 2]


def test_a_torn_line_of_another_writer_stays_alone(folder):
    log = EventLog(folder)
    log.append({"event": "Last", "n": 1})
    log.flush()
    with open(folder.path / "events.jsonl", "ab") as other:
        other.write(b'{"event": "Tick", "ti')
    log.append({"event": "Last", "n": 2})
    log.flush()
    assert numbers(folder) == [1, 2]


def test_on_a_full_disk_events_wait_in_memory_and_are_written_once_there_is_room(small_disk):  # noqa: F811
    folder = RunFolder.create(small_disk / "run")
    log = EventLog(folder)
    log.append({"event": "Last", "n": 0})
    log.flush()
    fill(small_disk)
    for n in range(1, 20):
        log.append({"event": "Last", "n": n, "notes": "x" * 10_000})
    while log.trouble is None:
        time.sleep(0.01)
    assert "found a full disk, expected room for the run" in str(log.trouble)
    assert numbers(folder) == list(range(len(numbers(folder))))
    (small_disk / "filler").unlink()
    log.flush()
    assert log.trouble is None
    assert numbers(folder) == list(range(20))  # none is missing, none is there twice


def test_a_disk_that_takes_nothing_for_long_costs_no_descriptors(folder, monkeypatch):
    """Each try opens the file anew, and closes that of the one before."""
    opened, path = [], folder.path / "events.jsonl"
    path.symlink_to("/dev/full")

    def noted(folder):
        opened.append(open_log(folder))
        if path.is_symlink():
            path.unlink()  # there is room from now on
        return opened[-1]

    monkeypatch.setattr(event_log, "open_log", noted)
    log = EventLog(folder)
    log.append({"event": "Last", "n": 0})
    log.flush()
    assert numbers(folder) == [0]
    assert [file.closed for file in opened] == [True, False]


def test_the_end_of_a_run_writes_what_waits_and_hides_no_error(folder):
    async def run(fails):
        async with EventLog(folder) as log:
            log.append({"event": "ChunkArrived", "n": 1})
            if fails:
                raise LookupError("the run's own")

    asyncio.run(run(False))
    with pytest.raises(LookupError, match="the run's own"):
        asyncio.run(run(True))
    assert numbers(folder) == [1, 1]


def write_for_ever(begun, folder):
    log = EventLog(folder)
    for n in itertools.count():
        log.append({"event": "Tick", "n": n, "filler": "x" * 5000})
        if n % 100 == 0:
            log.flush()
        if n == 100:
            begun.set()


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_whole_lines_without_a_gap(folder):
    with killed_at_the_end(write_for_ever, folder):
        pass
    folder.append_event({"event": "Last", "n": -1})
    found = numbers(folder)
    assert found[-1] == -1
    assert found[:-1] == list(range(len(found) - 1))
    assert len(found) > 100


def test_events_are_found_by_their_number_without_reading_those_before(folder):
    """Wherever the search lands, also among lines without a number."""
    log = EventLog(folder)
    for n in range(3000):
        log.append({"event": "ModelPublished", "padding": "x" * (n % 700)})
        if n % 500 == 0:
            log.flush()
            folder.append_event({"event": "RunEnded", "padding": "y" * 100_000})
    log.flush()
    for number in (0, 1, 499, 500, 501, 1777, 2999, 3000, 5000):
        found, last = event_log.events_after(folder, number)
        assert [event["seq"] for event in found] == list(range(number + 1, 3001))
        assert last == 3000 or not found


@pytest.mark.parametrize("torn", [b'{"event": "Tick", "seq', b"\x00\xff" * 40_000, b'{"event": "Tick", "seq": 3}', b""])
def test_a_torn_line_is_repaired_and_the_numbers_go_on(folder, torn):
    log = EventLog(folder)
    log.append({"event": "ModelPublished"})
    log.append({"event": "ModelPublished"})
    log.flush()
    with open(folder.path / "events.jsonl", "ab") as file:
        file.write(torn)
    assert event_log.repaired(folder) == bool(torn)
    assert not event_log.repaired(folder)
    events, last = event_log.events_after(folder, 0)
    whole = torn.endswith(b"}")
    assert last == len(events) == 2 + whole
    again = EventLog(folder, number=last)
    again.append({"event": "ModelPublished"})
    again.flush()
    assert [event["seq"] for event in folder.events()] == list(range(1, 4 + whole))
