"""The benchmarks with faults at a small size: everything goes on after each, and is accounted for."""

import sys
from pathlib import Path

import pytest

from steering.runner import RunFolder
from tests.command_line import ran

sys.path.append(str(Path(__file__).parents[1] / "workflows"))

from workflows import bench_faults, bench_soak

NOTHING = ("hangs", "frames_lost", "frames_twice", "decisions_repeated", "labels_unknown", "versions_lost")


OF_A_FOLDER = {"status", "identity", "started", "ended", "reason", "pid", "host"}
"""What a summary says of the run folder itself."""


FAULTS = ("stop:predictor", "stall:source", "cut:rank-0", "disk:everything", "kill:scheduler")
"""One of each kind."""


@pytest.mark.slow
def test_one_fault_of_each_kind_is_survived_by_one_campaign_and_nothing_is_lost(tmp_path, monkeypatch):
    """After the last one, which ends all else, `steering recover` goes on with a new cluster."""
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP", "11s")  # a network that was cut is noticed by its nanny
    words = ["--faults", ",".join(FAULTS), "--ranks", "2", "--hold", "5", "--seed", "183"]
    ran("bench_faults.py", tmp_path / "run", *words)
    figures = RunFolder(tmp_path / "run").summary()
    done = [f"{fault['kind']}:{fault['target']}" for fault in figures["faults"]["list"]]
    lacking = [fault for fault in FAULTS if fault not in done]
    assert done == [fault for fault in FAULTS if fault not in lacking]
    assert figures["faults"]["survived"] == len(done)
    assert [figures["faults"][key] for key in NOTHING] == [0] * len(NOTHING)
    assert figures["faults"]["healthy_lost"] == 0
    assert all(fault.get("chunks_predicted_while_full", 1) > 0 for fault in figures["faults"]["list"])
    for key in ("notice_s", "train_again_s", "predict_again_s"):
        assert figures[key]["p50"] <= figures[key]["p99"]
    assert figures["recover_s"]["p50"] > 0
    after = RunFolder.create(tmp_path / "after")
    bench_faults.main(after, [*words, "--after", str(tmp_path / "run")])  # nothing is left to do
    again = after.summary()
    assert {key for key in figures if again.get(key) != figures[key]} <= OF_A_FOLDER
    assert (after.path / "faults.png").stat().st_size > 1000
    assert {fault.partition(":")[0] for fault in lacking} <= {"cut", "disk"}
    if lacking:
        pytest.skip(f"this machine allows no network namespace, or no mount: {', '.join(lacking)} left out")


def test_figures_of_several_campaigns_are_added_and_one_that_was_cut_off_keeps_its_faults():
    one = {"number": 0, "kind": "kill", "target": "rank-0", "survived": True}
    whole = bench_faults.counted([one]) | {"frames": 100, "frames_lost": 0, "accounted": 1}
    cut_off = bench_faults.counted([one | {"number": 1}, one | {"number": 2, "survived": False}])
    found = bench_faults.added(whole, cut_off)
    assert [fault["number"] for fault in found["list"]] == [0, 1, 2]
    assert (found["survived"], found["hangs"], found["campaigns"]) == (2, 1, 2)
    assert (found["frames"], found["accounted"]) == (100, 1)


@pytest.mark.parametrize(
    "words", [["--only", "kill,stopp"], ["--targets", "rank-7"], ["--faults", "kill:rank-0,cut:everything"]]
)
def test_an_unknown_fault_is_refused_in_words(words, capsys):
    with pytest.raises(SystemExit):
        bench_faults.main(None, words)
    said = capsys.readouterr().err
    assert words[1].split(",")[-1] in said
    assert "some of" in said


def test_images_are_compared_over_the_scans_that_both_runs_have():
    assert bench_soak.compared({"a": 0.1, "b": 0.2, "c": 9.0}, {"a": 0.1, "b": 0.1})["over"] == pytest.approx(1.5)
    assert bench_soak.compared({}, {"a": 0.1}) == {"scans": 0}
