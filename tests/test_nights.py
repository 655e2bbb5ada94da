"""Laws of nightly runs: which model goes into service, what is forgotten, and who may work on a memory."""

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steering.learning import Memory

WORKFLOWS = Path(__file__).parents[1] / "workflows"
sys.path.insert(0, str(WORKFLOWS))  # as `steering run` has it
try:
    from nights.left import Busy, State, alone, memory_of
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
