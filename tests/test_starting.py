"""Laws of runs that start from others: they predict from the first frame, and add to what was learnt before."""

import fcntl
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from steering.cli import main
from steering.clusters import local
from steering.learning import Memory
from steering.learning.buffer_file import read_buffer
from steering.models import ModelStore, ProbeFirst
from steering.runner import RunFolder, run
from steering.runner.earlier_runs import origin_of
from tests.command_line import WORKFLOWS
from tests.test_runner import experiment, told

pytestmark = pytest.mark.slow
ROOT = WORKFLOWS.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run after the other on one cluster: the first, two that start from it, and one of another architecture."""
    base = tmp_path_factory.mktemp("runs")
    memory = base / "memory"
    parts = experiment(frames=200)
    other = replace(parts, network=ProbeFirst(window=64, patch=40, width=4))
    folders = {}
    with local(ranks=2) as client:
        for name, one in (
            ("first", replace(parts, memory=memory)),
            ("second", replace(experiment(frames=100), start_from=base / "first")),
            ("third", replace(experiment(frames=100), memory=memory)),
            ("other", replace(other, start_from=(base / "first", base / "second"))),
        ):
            folders[name] = RunFolder.create(base / name)
            run(one, client, folders[name])
    return folders, memory


def test_a_run_that_starts_from_another_predicts_with_its_model_from_the_first_frame(runs):
    folders, _ = runs
    [began] = told(folders["second"], "RunStarted")
    assert began["origins"] == [folders["first"].identity]
    assert told(folders["first"], "RunStarted") == []
    store, first = ModelStore(folders["second"].models), ModelStore(folders["first"].models)
    last = first.describe(first.newest())
    assert store.describe(0).steps == last.steps > 0
    assert store.describe(0).validation_error == last.validation_error
    weights, before = store.weights(0), first.weights(last.number)
    assert all(np.array_equal(weights[name], value) for name, value in before.items() if "optics" not in name)
    assert {event["version"] for event in told(folders["second"], "PredictionReady")[:1]} == {0}


def test_what_it_learns_is_added_to_what_was_learnt_before(runs, tmp_path):
    """Samples of both runs are in its buffers at its end, each frame once; old held-out frames are judged on."""
    folders, _ = runs
    found = {}
    for name in ("first", "second", "other"):
        origin = origin_of(folders[name])
        assert len(origin.buffers) == 2
        with ExitStack() as stack:
            states = [read_buffer([origin.folder / file for file in chain], stack) for chain in origin.buffers]
            keys = np.concatenate([state.key for state in states])
            assert len(np.unique(keys)) == len(keys)
            found[name] = {one.run for state in states for one in state.scans.values()}
    first, second, other = (folders[name].identity for name in ("first", "second", "other"))
    assert found == {"first": {first}, "second": {first, second}, "other": {first, second, other}}
    began, now = folders["second"].summary()["earlier_errors"]
    assert min(began, now) > 0
    assert folders["first"].summary()["earlier_errors"] is None


def test_another_architecture_starts_from_the_samples_alone_and_says_so(runs):
    folders, _ = runs
    [began] = told(folders["other"], "RunStarted")
    assert began["origins"] == [folders["first"].identity, folders["second"].identity]
    assert "from an untrained network: only the samples of first" in began["model"]
    assert ModelStore(folders["other"].models).describe(0).steps == 0


def test_a_memory_holds_what_runs_have_added(runs, capsys):
    folders, memory = runs
    assert [one.run for one in Memory(memory).held()] == [folders[name].identity for name in ("first", "third")]
    assert main(["memory", "show", str(memory)]) == 0
    shown = capsys.readouterr().out
    assert f"model of {folders['third'].identity}" in shown
    assert f"{folders['first'].identity}/brick" in shown
    assert main(["memory", "list", str(memory.parent)]) == 0
    assert "2 scans of 2 runs" in capsys.readouterr().out
    assert main(["memory", "prune", str(memory), "--scan", "first/brick"]) == 0
    assert "samples taken out" in capsys.readouterr().out
    assert [one.run for one in Memory(memory).held()] == [folders["third"].identity]
    assert folders["third"].summary()["left_behind"]["memory_samples"] > 0


NIGHTLY = WORKFLOWS / "nightly.py"


def night(out, *words, capsys, code=0):
    """What a nightly run in this process says, and complains of."""
    assert main(["run", "--out", str(out), str(NIGHTLY), *map(str, words)]) == code
    said = capsys.readouterr()
    return said.out, said.err


def held(lock):
    """Whether a process holds a lock."""
    try:
        with open(lock, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def test_of_two_nights_at_once_one_works_and_a_third_finds_nothing_new(runs, tmp_path, capsys, monkeypatch):
    """In cron's environment and another working folder; the runs that the memory lacks are taken in."""
    folders, memory = runs
    base, elsewhere = memory.parent, tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    taken = Memory(memory).contents().runs
    environment = {"HOME": "/", "LOGNAME": "root", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh", "PYTHONPATH": str(ROOT)}
    passes = ("--epochs", 20, "--margin", 0.5)  # of few samples: one scan may be worse by more than 5 %
    words = ["run", "--quiet", "--out", "first", NIGHTLY, base, *passes]
    command = [sys.executable, "-m", "steering.cli", *map(str, words)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        while not held(base / f".{memory.name}.nightly.lock"):
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
        _, complained = night("second", base, capsys=capsys, code=75)
        assert "found another nightly run at work there" in complained
        said = first.communicate(timeout=300)
    assert (first.returncode, *said) == (0, "", "")
    found = RunFolder("first").summary()
    assert found["night"]["published"], found["night"]
    matrix, scans = found["forgetting_matrix"], set(found["errors_by_scan"])
    assert list(matrix) == ["in service", "this night"]
    assert np.mean(list(matrix["this night"].values())) < np.mean(list(matrix["in service"].values()))
    names = {name: folder.identity for name, folder in folders.items()}
    assert set(Memory(memory).contents().runs) == set(names.values()) > set(taken)
    judged = {scan.rpartition("/")[0] for scan in scans}  # another test may have taken the first one's samples out
    assert judged - {names["first"]} == {names["second"], names["third"], names["other"]}
    assert found["judged_by_samples_of_the_memory"] == []
    store = ModelStore(memory / "models")
    assert (store.newest(), store.describe(0).trained_on.keys()) == (0, scans)
    assert Memory(memory).contents().version["steps"] == store.describe(0).steps > 0
    before = {path: path.stat().st_mtime_ns for path in memory.iterdir()}
    said, complained = night("third", base, *passes, capsys=capsys)
    assert "nothing is new since the last night, which published version 0" in said
    assert complained == ""
    assert {path: path.stat().st_mtime_ns for path in memory.iterdir()} == before
    assert sorted(path.name for path in elsewhere.iterdir()) == ["first"]
    assert (elsewhere / "first" / "forgetting.png").is_file()


def test_a_model_that_is_worse_is_not_published_and_runs_begin_with_the_one_before(runs, tmp_path, capsys):
    _, memory = runs
    before = Memory(memory).contents()
    said, _ = night(tmp_path / "run", memory, "--from-scratch", "--epochs", 0.1, "--ranks", 1, capsys=capsys)
    assert "not published: it is worse than the model in service on" in said
    assert Memory(memory).contents() == before
    assert ModelStore(memory / "models").newest() == 0
    found = RunFolder(tmp_path / "run").summary()
    assert list(found["forgetting_matrix"]) == ["night 0", "in service", "this night"]
    assert found["forgetting_matrix"]["night 0"] == found["forgetting_matrix"]["in service"]
    assert min(scan["forgotten"] for scan in found["errors_by_scan"].values()) > 0
    said, _ = night(tmp_path / "again", memory, "--from-scratch", "--epochs", 0.1, "--ranks", 1, capsys=capsys)
    assert "nothing is new since the last night, which published nothing: it is worse" in said
