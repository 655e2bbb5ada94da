"""Laws of nightly runs: which model goes into service, what is forgotten, and who may work on a memory."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steering import RunFolder
from steering.learning import Memory, RanksPart
from steering.learning.checkpoint import write_training
from steering.learning.tensor_file import TensorFile
from steering.learning.training_state import Packed
from steering.runner.manifest import Manifest, commit, write_part
from tests.test_memory import left_by

WORKFLOWS = Path(__file__).parents[1] / "workflows"
sys.path.insert(0, str(WORKFLOWS))  # as `steering run` has it
try:
    from nights.left import Busy, State, alone, memory_of, take_in
    from nights.verdict import forgetting, verdict
finally:
    sys.path.remove(str(WORKFLOWS))

SERVED = {"a": 0.2, "b": 0.1}


@pytest.mark.parametrize(
    ("after", "publish", "reason"),
    [
        ({"a": 0.1, "b": 0.1}, True, "its mean error over 2 scans is 0.1, that of the model in service 0.15"),
        ({"a": 0.1, "b": 0.1049}, True, "its mean error"),
        ({"a": 0.1, "b": 0.1051}, False, "worse than the model in service on b by 5 %, allowed 5%"),
        ({"a": 0.2, "b": 0.1}, False, "its mean error over 2 scans is 0.15"),
        ({"a": 0.1, "b": math.nan}, False, "its error is no number on b"),
    ],
)
def test_a_model_is_published_only_if_better_and_on_no_scan_much_worse(after, publish, reason):
    found = verdict(SERVED, after, 0.05)
    assert found.publish == publish
    assert reason in found.reason


def test_a_model_in_service_without_sense_is_replaced_by_any_other():
    assert verdict({"a": math.nan, "b": 0.1}, SERVED | {"b": 0.1}, 0.05).publish


@pytest.mark.parametrize(("before", "after"), [({}, {}), (SERVED, {"a": 0.1})])
def test_models_are_compared_on_the_same_scans(before, after):
    with pytest.raises(ValueError, match="expected the same scans"):
        verdict(before, after, 0.05)


def test_what_is_forgotten_is_measured_against_the_best_before():
    first, second = {"a": 0.1, "b": 0.9}, {"a": 0.3, "b": 0.2}
    assert forgetting([first, second, {"a": 0.2, "b": 0.1}]) == pytest.approx({"a": 0.1, "b": -0.1})


def leave(run, number, count, *, good=True):
    """What the ranks of a run have left at a checkpoint: so many frames of a scan, and a model."""
    root, identity = run.checkpoints, run.identity
    weights, buffer = (f"ranks/{number:08d}.{name}.safetensors" for name in ("weights", "rank-0.buffer"))
    left_by(root / "ranks", identity, "a", ranks=1, count=count)
    (root / f"ranks/{identity}-0").rename(root / buffer)
    write_training(root / weights, Packed({"network.w": torch.full((3,), float(number))}, {"step": number}))
    if not good:
        (root / buffer).write_bytes(b"")
    part = RanksPart(number=number, step=number, ranks=1, weights=weights, buffers=((buffer,),), samples=(), bytes=0)
    digest, _ = write_part(root, number, "ranks", part.to_json())
    files = {name: (root / name).stat().st_size for name in part.files}
    commit(root, Manifest(number=number, event=1, time=0.0, parts={"ranks": digest}, files=files, bytes=0))
    return root / weights


@pytest.fixture
def day(tmp_path):
    """Takes in what is in a folder of runs; the samples by run, and the complaints."""
    memory = Memory(tmp_path / "memory")

    def take():
        complaints = take_in(tmp_path, memory, State.read(memory))
        return {one.run.rpartition("-")[0]: one.samples for one in memory.held()}, complaints

    return take


def test_a_run_that_has_failed_and_was_recovered_is_added_again(tmp_path, day):
    run, memory = RunFolder.create(tmp_path / "run"), Memory(tmp_path / "memory")
    leave(run, 1, 30)
    assert day() == ({}, [])
    run.write_summary({"status": "failed"})
    assert day() == ({"run": 30}, [])
    before = memory.contents()
    assert (day(), memory.contents()) == (({"run": 30}, []), before)
    run.write_summary({"status": "running", "pid": 2**22 + 1})  # no process has this number
    samples, [complaint] = day()
    assert (samples, complaint.startswith("run was killed and is left out until it has ended: ")) == ({"run": 30}, True)
    run.write_summary({"pid": os.getpid()})
    leave(run, 3, 60)
    assert (day(), memory.contents()) == (({"run": 30}, []), before)
    run.write_summary({"status": "finished"})
    assert day() == ({"run": 60}, [])
    after = memory.contents()
    assert after.runs == (run.identity,)
    with TensorFile(memory.path / after.weights, "training") as weights:
        assert weights.tensor("network.w").tolist() == [3.0] * 3


def test_a_run_that_did_not_fit_is_refused_until_it_has_gone_on(tmp_path, day):
    run = RunFolder.create(tmp_path / "run")
    run.write_summary({"status": "failed"})
    leave(run, 1, 30, good=False)
    samples, [complaint] = day()
    assert (samples, "run is left out: found" in complaint) == ({}, True)
    assert day() == ({}, [])
    leave(run, 2, 60)
    assert day() == ({"run": 60}, [])


def test_a_run_from_a_stranger_keeps_no_other_one_out(tmp_path, day):
    """Its weights lead to a file of this machine."""
    for name in ("a", "b"):
        run = RunFolder.create(tmp_path / name)
        run.write_summary({"status": "finished"})
        weights = leave(run, 1, 30)
        if name == "a":
            weights.rename(tmp_path / "secret")
            weights.symlink_to(tmp_path / "secret")
    samples, [complaint] = day()
    assert samples == {"b": 30}
    assert complaint.startswith("a cannot be read: ")


def test_a_damaged_memory_is_no_fault_of_the_runs(tmp_path, day):
    run, memory = RunFolder.create(tmp_path / "run"), Memory(tmp_path / "memory")
    run.write_summary({"status": "failed"})
    leave(run, 1, 30)
    day()
    samples = memory.path / memory.contents().samples
    samples.rename(tmp_path / "gone")
    leave(run, 2, 60)
    with pytest.raises(ValueError, match="half of this memory was deleted"):
        day()
    (tmp_path / "gone").rename(samples)
    assert day() == ({"run": 60}, [])


HOLDS = """
import sys, time
from pathlib import Path
from nights.left import alone
from steering.learning import Memory

with alone(Memory(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(100)
"""


def test_one_works_on_a_memory_and_a_dead_one_holds_nothing(tmp_path):
    """Whether it is named itself or by the folder of its runs."""
    memory = tmp_path / "memory"
    command = [sys.executable, "-c", HOLDS, str(memory)]
    path = {"PYTHONPATH": f"{WORKFLOWS}:{WORKFLOWS.parent}"}
    with subprocess.Popen(command, env=path, stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == b"held\n"
            for named in (memory_of(tmp_path, None), memory_of(tmp_path, str(memory)), Memory(memory)):
                with pytest.raises(Busy, match="found another nightly run at work"), alone(named):
                    pass
        finally:
            first.send_signal(signal.SIGKILL)
    with alone(Memory(memory)):
        pass
    assert not memory.exists()


def test_what_is_no_folder_of_runs_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder of runs, or a memory"):
        memory_of(tmp_path / "none", None)
    (tmp_path / "summary.json").touch()
    with pytest.raises(ValueError, match="found a single run"):
        memory_of(tmp_path, None)
    (tmp_path / "nightly.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match=r"nightly\.json damaged"):
        State.read(Memory(tmp_path))
