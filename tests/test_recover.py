"""A run whose processes are all killed at once goes on: on as many ranks, fewer or more, and nothing is there twice."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from steering.clusters import local
from steering.models import ModelStore
from steering.runner import RunFolder
from steering.runner.ending import WATCHER
from steering.runner.manifest import newest_whole, read_part
from tests.command_line import said

WORKFLOW = Path(__file__).parent / "recovered_run.py"
FRAMES = 150
"""Of each of the two scans."""


def start(*arguments):
    """A process with all that it starts in a group of its own."""
    command = [sys.executable, "-m", "steering.cli", *map(str, arguments)]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, start_new_session=True, text=True, env=dict(os.environ), **both)


def until(process, true):
    """Wait until something is true, while a process lives."""
    limit = time.monotonic() + 240
    while not true():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.1)


def of_kind(folder, *kinds):
    return [event for event in folder.events() if event.get("event") in kinds]


def killed(path, moment, *arguments, when):
    """A run that is killed with all its processes, so many seconds after `when(folder)` is true."""
    process = start("run", "--out", path, WORKFLOW, *arguments)
    try:
        until(process, lambda: (path / "summary.json").exists() and when(RunFolder(path)))
        time.sleep(moment)
        assert process.poll() is None, process.communicate()[0]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return RunFolder(path)


def ready(folder):
    """A version was published, and a checkpoint was written after that."""
    events = of_kind(folder, "CheckpointWritten", "ModelPublished")
    published = [number for number, event in enumerate(events) if event.get("version")]
    return bool(published) and any(event["event"] == "CheckpointWritten" for event in events[published[0] :])


def ahead(folder):
    """Frames came after the first checkpoint, which a long time will pass without another."""
    written = of_kind(folder, "CheckpointWritten")
    return bool(written) and sum(e["seq"] > written[0]["seq"] for e in of_kind(folder, "ChunkArrived")) >= 3


def recovered(folder, *arguments):
    """What is said when a run goes on with these arguments of its workflow, and twice as fast."""
    return "\n".join(said("recover", folder.path, "--", "--rate", 50, *arguments))


def check(folder, *, lost=0):
    """Every frame arrived, was predicted and is in the image once; no position was decided twice; versions go on."""
    summary = folder.summary()
    assert summary["status"] == "finished"
    assert summary["recover"]["recoveries"] == 1
    assert sum(summary["recover"]["frames_lost"].values()) == lost
    images = folder.objects()
    gone = {(e["scan"], i) for e in of_kind(folder, "FramesLost") for i in e["frame_ids"]}
    every = {(scan, i) for scan, first in (("brick", 0), ("coins", FRAMES)) for i in range(first, first + FRAMES)}
    assert len(gone) == lost
    for kind in ("ChunkArrived", "PredictionReady"):
        ids = Counter((e["scan"], i) for e in of_kind(folder, kind) for i in e["frame_ids"])
        assert set(ids.values()) == {1}, f"{kind}: {ids.most_common(3)}"
        assert set(ids) | gone == every
    pictured = [(scan, i) for scan, image in images.items() for i in image["frame"].values.tolist()]
    assert sorted(pictured) == sorted(every - gone)
    decided = [tuple(p) for e in of_kind(folder, "DecisionSuggested") for p in e["positions"]]
    assert max(Counter(decided[: 2 * FRAMES]).values()) <= 2  # a candidate at most once in each scan
    taken = [e for e in folder.events() if e["event"] != "AnswerIgnored"]
    answers = Counter(e["action"] for e in taken if e.get("action") is not None)
    assert max(answers.values()) == 1
    served = [e["version"] for e in of_kind(folder, "ModelPublished")]
    assert served == sorted(set(served))
    assert {version.number for version in ModelStore(folder.models).versions()} == set(served)
    sequence = [event["seq"] for event in folder.events() if "seq" in event]
    assert sequence == list(range(1, len(sequence) + 1))
    return summary


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """The folder of a run on two ranks whose processes were all killed, at any moment after a checkpoint."""
    moment = random.uniform(0.0, 1.5)
    print(f"killed {moment:.3f} s after a checkpoint")
    return killed(tmp_path_factory.mktemp("dead") / "run", moment, "--ranks", 2, when=ready).path


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_everything_is_killed_and_the_run_goes_on(dead, tmp_path, ranks):
    folder = RunFolder(shutil.copytree(dead, tmp_path / "run"))
    before, manifest = folder.events(), newest_whole(folder)[0]
    saved = read_part(folder.checkpoints, manifest, "ranks")["step"]
    lost = sum(e["steps"] > saved for e in of_kind(folder, "CandidateReady"))
    assert "goes on from checkpoint" in recovered(folder, "--ranks", ranks)
    summary = check(folder)
    assert summary["ranks"] == ranks
    assert folder.events()[: len(before) - 1] == before[:-1]
    number = of_kind(folder, "RunRecovered")[0]["number"]
    steps = [e["steps"] for e in of_kind(folder, "CandidateReady") if e["seq"] > len(before)]
    assert all(step > 10 for step in steps), f"training began anew after checkpoint {number}"
    assert [e["rounds_lost"] for e in of_kind(folder, "GroupChanged") if e["seq"] > len(before)] == [lost]
    assert json.loads((folder.path / "workflow.json").read_text())["arguments"][-1] == str(ranks)
    assert "found a run that is finished" in "".join(said("recover", folder.path, code=1))


UNREPEATED = ("--ranks", 1, "--checkpoint", 1000, "--forgets")


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory):
    """The folder of a run that was killed long after its checkpoint, from a source that gives no frame twice."""
    return killed(tmp_path_factory.mktemp("forgetful") / "run", 0.0, *UNREPEATED, "--spool", when=ahead).path


@pytest.mark.slow
@pytest.mark.parametrize("spool", [False, True])
def test_frames_that_the_source_cannot_give_again_are_spooled_or_told_as_lost(forgetful, tmp_path, spool):
    folder = RunFolder(shutil.copytree(forgetful, tmp_path / "run"))
    known = {i for e in of_kind(folder, "ChunkArrived") for i in e["frame_ids"]}
    if not spool:
        shutil.rmtree(folder.checkpoints / "spool")
    recovered(folder, *UNREPEATED, *["--spool"] * spool)
    lost = {i for e in of_kind(folder, "FramesLost") for i in e["frame_ids"]}
    assert lost <= known
    assert bool(lost) != spool
    check(folder, lost=len(lost))
    assert folder.summary()["recover"]["frame_ids_lost"] == sorted(lost)


@pytest.mark.slow
def test_a_frozen_runner_is_followed_by_another_one_while_the_driver_lives(tmp_path):
    """Source and runner share a worker of a local cluster: both go, ranks and predictor stay."""
    path = tmp_path / "run"
    process = start("run", "--out", path, WORKFLOW, "--ranks", 1)
    try:
        until(process, lambda: (path / "summary.json").exists() and ready(RunFolder(path)))
        os.kill(json.loads((path / ".runner.lock").read_text())["pid"], signal.SIGSTOP)
        told, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, told
    assert "another runner goes on from checkpoint" in told
    check(RunFolder(path))


def without_driver(client, path, *arguments):
    """A run whose driver is killed, and then its runner."""
    process = start("run", "--out", path, WORKFLOW, "--ranks", 1, "--cluster", client.scheduler.address, *arguments)
    try:
        until(process, lambda: (path / "summary.json").exists() and ready(RunFolder(path)))
        until(process, lambda: WATCHER in client.list_datasets())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def kill_runner(path):
    os.kill(json.loads((path / ".runner.lock").read_text())["pid"], signal.SIGKILL)


@pytest.mark.slow
def test_a_lost_runner_is_followed_by_another_one_where_no_driver_is_there(tmp_path):
    """On a cluster that outlives the driver a watcher does what the driver would do."""
    with local(ranks=1, apart=True) as client:
        path = tmp_path / "watched"
        without_driver(client, path)
        kill_runner(path)
        until(None, lambda: RunFolder(path).summary()["status"] != "running")
        until(None, lambda: (path / "report.html").exists())
        check(RunFolder(path))
