"""Laws of a memory: what runs add stays, in whatever order and whenever; damage is said, and loses nothing."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from steering.cli import main
from steering.learning import Memory, Origin, identities, memories, stratum_of
from steering.learning.buffer import BOOKKEEPING, RehearsalBuffer
from steering.learning.buffer_file import write_state
from steering.learning.buffer_state import ScanName
from steering.learning.checkpoint import write_training
from steering.learning.identity import WHOLE, keys_of
from steering.learning.samples_file import write_held_out
from steering.learning.tensor_file import inside
from steering.learning.training_state import Packed
from steering.runner import RunFolder

BYTES = 8 + 8 + BOOKKEEPING


def left_by(folder, run, *scans, ranks=2, capacity=1000, count=60):
    """What a run leaves: a buffer of each rank, with frames of these scans."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        buffer = RehearsalBuffer(capacity * BYTES)
        for scan in scans:
            stratum = stratum_of(run, scan)
            buffer.scans[stratum] = ScanName(run, scan, time.time())
            mine = torch.arange(rank, count, ranks)
            own = torch.from_numpy(identities(run, scan, mine.numpy()))
            buffer.insert({"id": mine}, torch.full((len(mine),), stratum), own)
        write_state(buffer.state(), folder / f"{run}-{rank}")
    return Origin(folder=folder, run=run, buffers=tuple((f"{run}-{rank}",) for rank in range(ranks)))


def held(memory):
    return {f"{one.run}/{one.scan}": one.samples for one in memory.held()}


def test_runs_are_added_in_any_order_and_each_once(tmp_path):
    runs = [left_by(tmp_path, run, "a", "b") for run in ("x", "y", "z")]
    found = []
    for number, order in enumerate(([0, 1, 2], [2, 1, 0, 0], [1, 0, 2, 1])):
        memory = Memory(tmp_path / f"memory-{number}")
        memory.keep(200 * BYTES)
        for run in order:
            memory.add(runs[run].run, runs[run], {"number": 1})
        found.append(held(memory))
        assert sum(found[-1].values()) == 200
        assert len([p for p in memory.path.iterdir() if p.name.startswith("samples-")]) == 1
        assert memory.contents().version is None  # there are no weights with it
    assert found[0] == found[1] == found[2]


def test_what_is_kept_are_the_smallest_keys_of_all(tmp_path):
    memory = Memory(tmp_path / "memory")
    memory.keep(50 * BYTES)
    for run in ("x", "y", "z"):
        memory.add(run, left_by(tmp_path, run, "a"), None)
    every = {run: np.sort(keys_of(identities(run, "a", np.arange(60)))) for run in ("x", "y", "z")}
    limit = np.sort(np.concatenate(list(every.values())))[50]
    assert held(memory) == {f"{run}/a": int((keys < limit).sum()) for run, keys in every.items()}
    assert sum(one.offered for one in memory.held()) == pytest.approx(180, rel=0.5)


def test_a_run_that_has_forgotten_much_takes_nothing_from_what_the_memory_knows(tmp_path):
    memory = Memory(tmp_path / "memory")
    memory.add("x", left_by(tmp_path, "x", "a"), None)
    memory.add("y", left_by(tmp_path, "y", "a", capacity=5), None)
    assert held(memory)["x/a"] == 60
    assert 0 < held(memory)["y/a"] <= 10


def test_a_scan_that_is_taken_out_is_gone_from_every_file_and_does_not_come_back(tmp_path, capsys):
    memory, origin = Memory(tmp_path / "memory"), left_by(tmp_path, "x", "a", "b")
    memory.add("x", origin, None)
    gone = identities("x", "a", np.arange(60))
    assert main(["memory", "prune", str(memory.path), "--scan", "x/a"]) == 0
    assert "x/a: 60 samples" in capsys.readouterr().out
    memory.add("x", origin, None)
    assert held(memory) == {"x/b": 60}
    for path in memory.path.iterdir():
        content = path.read_bytes()
        assert not any(int(key).to_bytes(8, "little") in content for key in keys_of(gone))
    assert main(["memory", "prune", str(memory.path), "--scan", "x/a"]) == 1
    assert "expected one of: x/b" in capsys.readouterr().err


def add_later(path, folder, run, go):
    go.wait(30)
    Memory(path).add(run, left_by(folder, run, "a"), None)


def test_runs_that_end_at_the_same_time_are_all_there(tmp_path):
    context = multiprocessing.get_context("fork")
    go = context.Event()
    runs = [f"run{n}" for n in range(4)]
    ending = [context.Process(target=add_later, args=(tmp_path / "memory", tmp_path, run, go)) for run in runs]
    for process in ending:
        process.start()
    go.set()
    for process in ending:
        process.join(60)
        assert process.exitcode == 0
    assert held(Memory(tmp_path / "memory")) == {f"{run}/a": 60 for run in runs}


def test_a_lock_goes_with_its_holder_and_whoever_waits_says_for_whom(tmp_path, monkeypatch):
    memory = Memory(tmp_path / "memory")
    memory.add("x", left_by(tmp_path, "x", "a"), None)
    monkeypatch.setattr("steering.learning.memory.PATIENCE_S", 0.1)
    with memory.reading(), pytest.raises(TimeoutError, match="another process has held"):
        memory.check_writable()
    child = os.fork()
    if child == 0:
        fcntl.flock(os.open(memory.path / ".lock", os.O_RDWR), fcntl.LOCK_EX)
        os._exit(1)  # without a word
    os.waitpid(child, 0)
    memory.check_writable()


def test_who_reads_waits_for_a_writer_whose_files_come_and_go(tmp_path, monkeypatch):
    """Found by a look beside a run's end: files that the index had named a moment before were half of a memory."""
    memory = Memory(tmp_path / "memory")
    memory.add("x", left_by(tmp_path, "x", "a"), None)
    monkeypatch.setattr("steering.learning.memory.PATIENCE_S", 0.1)
    writer = os.open(memory.path / ".lock", os.O_RDWR)
    fcntl.flock(writer, fcntl.LOCK_EX)
    for read in (memory.held, memory.held_out):
        with pytest.raises(TimeoutError, match="another process has held"):
            read()
    os.close(writer)
    assert held(memory) == {"x/a": 60}


def whole_run(folder, run):
    """What a run leaves, with a model and held-out frames."""
    made = replace(left_by(folder, run, "a"), weights=f"{run}-weights", samples=(f"{run}-samples",))
    write_training(folder / f"{run}-weights", Packed({"network.w": torch.ones(9)}, {"step": 1}))
    row = {name: torch.ones(2, 2) for name in ("counts", "amplitude", "phase")}
    row |= {"stratum": torch.tensor(stratum_of(run, "a")), "identity": torch.tensor(7)}
    write_held_out({"a": {60: row}}, folder / f"{run}-samples")
    return made


def interrupted(memory, origin, how, step):
    """Add a run in a process that at the n-th step which changes the folder is killed, or finds the disk full from then
    on; whether it came to its end all the same."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    steps = 0

    def look(event, args):
        nonlocal steps
        writes = event in ("os.rename", "os.truncate") or (event == "open" and args[2] & os.O_ACCMODE)
        if writes or (event == "os.remove" and how == "killed"):
            steps += 1
            if steps >= step and how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if steps >= step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(look)
    try:
        memory.add(origin.run, origin, {"number": 1})
        os._exit(0)
    except OSError:
        os._exit(1)


@pytest.mark.parametrize("how", ["killed", "full"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_an_add_that_is_cut_short_loses_nothing_and_the_next_one_succeeds(tmp_path, how, first):
    """At each of its steps; what it has written is removed, at once or by the next one."""
    runs = [whole_run(tmp_path, "y")] if first else [whole_run(tmp_path, "x"), whole_run(tmp_path, "y")]
    *before, origin = runs
    over, step = False, 0
    while not over:
        step += 1
        memory = Memory(tmp_path / f"memory-{step}")
        for one in before:
            memory.add(one.run, one, {"number": 1})
        there = held(memory)
        over = interrupted(memory, origin, how, step)
        assert held(memory) in (there, there | {"y/a": 60})
        assert how == "killed" or over or names(memory) == {*memory.contents().files} | names(memory, ".json", ".lock")
        memory.add(origin.run, origin, {"number": 1})
        assert held(memory) == {f"{one.run}/a": 60 for one in runs}
        assert set(memory.held_out()) == {f"{one.run}/a" for one in runs}
        assert names(memory) == {*memory.contents().files, "memory.json", ".lock"}
    assert step > 10


def names(memory, *ends):
    return {path.name for path in memory.path.iterdir() if path.name.endswith(ends or "")}


def test_what_is_left_of_a_run_leads_to_no_other_file(tmp_path):
    """The weights of a run folder from a stranger: a link to any file of this machine, a pipe, something else."""
    memory, origin = Memory(tmp_path / "memory"), whole_run(tmp_path, "x")
    memory.add("x", whole_run(tmp_path, "x"), {"number": 1})
    weights, before = tmp_path / "x-weights", memory.contents()
    (tmp_path / "secret").write_bytes(b"a key of this machine" * 10)
    weights.unlink()
    weights.symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic link"):
        memory.add("x", origin, {"number": 2})
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ValueError, match="no regular file"):
        memory.add("x", origin, {"number": 2})
    weights.unlink()
    (tmp_path / "secret").rename(weights)
    with pytest.raises(ValueError, match="damaged or of another format"):
        memory.add("x", origin, {"number": 2})
    assert memory.contents() == before
    assert names(memory) == {*before.files, "memory.json", ".lock"}


@pytest.mark.parametrize("name", ["memory.json", ".lock"])
def test_a_memory_from_a_stranger_is_no_link_and_no_pipe(tmp_path, name):
    memory = Memory(tmp_path / "memory")
    memory.add("x", left_by(tmp_path, "x", "a"), None)
    (memory.path / name).rename(tmp_path / name)
    (memory.path / name).symlink_to(tmp_path / name)
    with pytest.raises((OSError, ValueError), match="link"):
        memory.keep(10**6)
    (memory.path / name).unlink()
    os.mkfifo(memory.path / name)
    if name == ".lock":  # harmless: nobody writes to it or reads from it
        assert held(memory) == {"x/a": 60}
    else:
        with pytest.raises(ValueError, match="no regular file"):
            held(memory)


def damaged(memory, how):
    index = memory.path / "memory.json"
    content = json.loads(index.read_text())
    if how == "format":
        index.write_text(json.dumps(content | {"format": "steering-memory 9"}))
    elif how == "index gone":
        index.unlink()
    elif how == "samples gone":
        (memory.path / content["samples"]).unlink()
    elif how == "an older index":
        memory.keep(50 * BYTES)
        index.write_text(json.dumps(content))
    elif how == "samples cut short":
        os.truncate(memory.path / content["samples"], 500)
    elif how == "no JSON":
        index.write_text("{")
    elif how == "leads elsewhere":
        index.write_text(json.dumps(content | {"samples": "samples-/../../secret"}))
    elif how == "link":
        (memory.path / content["samples"]).rename(memory.path.parent / "moved")
        (memory.path / content["samples"]).symlink_to(memory.path.parent / "moved")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("format", "steering-memory 9"),
        ("index gone", "half of this memory was deleted"),
        ("samples gone", "half of this memory was deleted"),
        ("an older index", "half of this memory was deleted"),
        ("samples cut short", "damaged"),
        ("no JSON", "damaged"),
        ("leads elsewhere", "damaged"),
        ("link", "symbolic link"),
    ],
)
def test_damage_is_said_and_nothing_more_is_lost(tmp_path, how, said):
    memory = Memory(tmp_path / "memory")
    memory.add("x", left_by(tmp_path, "x", "a"), None)
    damaged(memory, how)
    before = {path.name: path.read_bytes() for path in memory.path.iterdir()}
    for use in (memory.held, lambda: memory.add("y", left_by(tmp_path, "y", "a"), None), lambda: memory.keep(10**6)):
        with pytest.raises((ValueError, OSError), match=said):
            use()
    assert {path.name: path.read_bytes() for path in memory.path.iterdir()} == before


def test_where_it_cannot_be_written_that_is_said_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="start with --from instead"):
        Memory(tmp_path / "file" / "memory").check_writable()


READ_ONLY = """
import sys
from pathlib import Path
from steering.learning import Memory

memory = Memory(Path(sys.argv[1]))
with memory.reading():
    assert memory.held()[0].samples == 60 and memory.origin() is not None
try:
    memory.check_writable()
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_memory_on_a_read_only_mount_is_read_and_refused_for_adding(tmp_path):
    memory = Memory(tmp_path / "memory")
    memory.add("x", left_by(tmp_path, "x", "a"), None)
    mount = f"mount --bind {memory.path} {memory.path} && mount -o remount,bind,ro {memory.path} || exit 77"
    command = ["unshare", "-m", "sh", "-c", f'{mount}; exec "$@"', "sh", sys.executable, "-c", READ_ONLY, memory.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"no mounts of our own here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert "Read-only file system" in done.stdout
    assert "nothing was changed" in done.stdout


def test_a_link_that_leads_out_of_a_folder_is_not_followed(tmp_path):
    origin = left_by(tmp_path / "own" / "ranks", "x", "a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ranks").symlink_to(origin.folder)
    with pytest.raises(ValueError, match="leads elsewhere"):
        inside(tmp_path / "other", "ranks/x-0")
    assert inside(tmp_path / "own", "ranks/x-0").is_file()


@pytest.mark.parametrize("bring", ["scan", "version"])
def test_a_run_that_brings_more_names_than_a_reader_takes_is_refused(tmp_path, bring):
    memory = Memory(tmp_path / "memory")
    memory.add("x", whole_run(tmp_path, "x"), None)
    before, made = memory.contents(), whole_run(tmp_path, "y")
    if bring == "scan":
        buffer = RehearsalBuffer(10_000)
        for number in range(2):  # in the run's own file there is room for each of them
            stratum = stratum_of("y", str(number))
            buffer.scans[stratum] = ScanName("y", str(number) * 3 * 2**20, 0.0)
            buffer.insert({"id": torch.arange(3)}, torch.full((3,), stratum), torch.arange(3) + 3 * number)
            write_state(buffer.state(), tmp_path / f"y-{number}")
            buffer = RehearsalBuffer(10_000)
    version = {"network": "N" * 2**24} if bring == "version" else None
    with pytest.raises(ValueError, match=r"bytes (of names for|that .* would have).* at most"):
        memory.add("y", made, version)
    assert memory.contents() == before
    assert names(memory) == {*before.files, "memory.json", ".lock"}


def test_samples_of_another_kind_are_refused_and_the_memory_stays(tmp_path):
    memory = Memory(tmp_path / "memory")
    memory.add("x", left_by(tmp_path, "x", "a"), None)
    buffer = RehearsalBuffer(10_000)
    stratum = stratum_of("y", "a")
    buffer.scans[stratum] = ScanName("y", "a", 0.0)
    buffer.insert({"other": torch.zeros(3, 2)}, torch.full((3,), stratum), torch.arange(3))
    write_state(buffer.state(), tmp_path / "y")
    with pytest.raises(ValueError, match="different fields"):
        memory.add("y", Origin(folder=tmp_path, run="y", buffers=(("y",),)), None)
    assert held(memory) == {"x/a": 60}
    assert [one.path for one in memories([tmp_path])] == [memory.path]
    assert memory.contents().budget_bytes < WHOLE


def test_the_command_line_hands_a_start_to_every_workflow(tmp_path, capsys):
    """Before the workflow's name or after it; a run that is not there is refused before anything is made."""
    workflow = tmp_path / "flow.py"
    workflow.write_text("def main(folder, arguments):\n    print('told', folder.start(), arguments)\n")
    earlier = RunFolder.create(tmp_path / "earlier")
    given = ["--out", str(tmp_path / "run"), "--from", str(earlier.path), "--memory", str(tmp_path / "memory")]
    for words in ([*given, str(workflow), "--size", "3"], [str(workflow), "--size", "3", *given]):
        assert main(["run", *words]) == 0
        expected = {"from": [str(earlier.path)], "memory": str(tmp_path / "memory")}
        assert f"told {expected} ['--size', '3']" in capsys.readouterr().out
        for path in (tmp_path / "run").glob("*"):
            path.unlink() if path.is_file() else path.rmdir()
        for path in (tmp_path / "run").glob(".*"):
            path.unlink()
    assert main(["run", str(workflow), "--from", str(tmp_path / "nowhere"), "--out", str(tmp_path / "new")]) == 1
    assert "found no run and no memory there" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert RunFolder.create(tmp_path / "plain").start() == {"from": [], "memory": None}
