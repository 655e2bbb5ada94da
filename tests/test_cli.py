"""The command line: exit codes, what is said where, and a folder that tells how each run ended."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steering import __version__, cli
from steering.commands.words import message
from steering.runner.folder import RunFolder
from tests import command_line

GOOD = """
import time
def main(folder, arguments):
    folder.append_event({"event": "ChunkArrived", "time": time.time(), "scan": "a", "frame_ids": [0, 1]})
    folder.write_summary({"scans": ["a"], "frames_acquired": 2, "arguments": arguments})
"""
FAILS = """
def main(folder, arguments):
    raise ValueError("found 3 frames, expected 4:\\nmeasure one more")
"""
PARSES = """
import argparse
def main(folder, arguments):
    parser = argparse.ArgumentParser(description="A workflow of one dial.")
    parser.add_argument("--ranks", type=int)
    parser.parse_args(arguments)
"""
WAITS = """
import time
def main(folder, arguments):
    folder.append_event({"event": "ChunkArrived", "time": time.time(), "scan": "a", "frame_ids": [0, 1]})
    print("measuring", flush=True)
    try:
        time.sleep(60)
    finally:
        print("closed down", flush=True)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test in a folder of its own, with its own idea of how it was called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["steering"])
    return tmp_path


def write(source, name="work.py"):
    Path(name).write_text(source)
    return name


def steering(*arguments):
    command = [sys.executable, "-m", "steering.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_long_error_keeps_what_was_found_and_what_to_do():
    said = message(ValueError(f"found {'x, ' * 400} and no frames: say where (--frames)"))
    assert len(said) <= 400
    assert said.startswith("found x, x")
    assert said.endswith("and no frames: say where (--frames)")
    assert message(ValueError("found 3,\n expected 4")) == "found 3, expected 4"


def test_a_run_is_made_ended_and_reported(capsys):
    assert cli.main(["run", write(GOOD), "--out", "out", "recorded.npz", "--strategy", "er", "--out-of=2"]) == 0
    folder = RunFolder("out")
    summary = folder.summary()
    assert (summary["status"], summary["reason"]) == ("finished", "")
    assert summary["arguments"] == ["recorded.npz", "--strategy", "er", "--out-of=2"]
    assert folder.events()[-1]["status"] == "finished"
    assert (folder.path / "workflow.py").read_text() == GOOD
    assert (folder.path / "report.html").is_file()
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "report: out/report.html"
    assert said.err == ""


def test_runs_without_a_name_get_one_each(capsys):
    write(GOOD)
    for _ in range(3):
        assert cli.main(["run", "work.py"]) == 0
    folders = sorted(path.name for path in Path("runs").iterdir())
    assert len(folders) == 3
    assert all(re.fullmatch(r"work-\d{8}-\d{6}(_\d)?", name) for name in folders)


def test_a_workflow_that_raises_is_told_in_two_lines_and_kept_whole_in_the_log(capsys):
    assert cli.main(["run", write(FAILS), "--out=out"]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "steering: work.py failed: found 3 frames, expected 4: measure one more",
        "steering: the traceback is in the last line of out/events.jsonl",
    ]
    assert said.out.splitlines()[-1] == "report: out/report.html"
    last = json.loads(Path("out/events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["status"]) == ("RunEnded", "failed")
    assert "Traceback (most recent call last)" in last["traceback"]
    assert "work.py" in last["traceback"]
    assert RunFolder("out").summary()["status"] == "failed"
    assert "This run failed." in Path("out/report.html").read_text()


def test_an_error_that_is_no_sentence_comes_with_its_kind_and_place(capsys):
    cli.main(["run", write("def main(folder, arguments): {}['probe']\n"), "--out", "out"])
    assert "work.py failed: KeyError: 'probe' (work.py, line 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "work.py: found no such file, expected a workflow file"),
        ("", "work.py: found no function main, expected `def main(folder, arguments)`"),
        ("x = 1\ndef broken(:\n", "work.py, line 2: found a syntax error"),
        ("import nothing_of_this_name\n", "work.py: No module named 'nothing_of_this_name'; expected"),
        ("1 / 0\n", "ZeroDivisionError: division by zero (work.py, line 1)"),
    ],
)
def test_a_workflow_that_cannot_be_loaded_begins_no_run(capsys, here, source, said):
    if source is not None:
        write(source)
    assert cli.main(["run", "work.py", "--out", "out"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not Path("out").exists()
    assert not Path("runs").exists()


def test_a_folder_or_another_kind_of_file_is_no_workflow(capsys):
    assert cli.main(["run", ".", "--out", "out"]) == 1
    assert cli.main(["run", write("{}", "work.json"), "--out", "out"]) == 1
    said = capsys.readouterr().err
    assert "found a folder, expected a workflow file" in said
    assert "found a file of another kind, expected a Python file (.py)" in said


@pytest.mark.parametrize("out", ["file/run", "file", "used"])
def test_an_output_folder_that_cannot_be_is_refused(capsys, out):
    Path("file").write_text("")
    Path("used").mkdir()
    Path("used/something").write_text("")
    assert cli.main(["run", write(GOOD), "--out", out]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "expected a new or empty one" in said or "choose another folder" in said
    assert Path("file").read_text() == ""
    assert [path.name for path in Path("used").iterdir()] == ["something"]


def test_out_without_a_folder_is_refused(capsys):
    assert cli.main(["run", write(GOOD), "--out"]) == 1
    assert "found --out without a folder" in capsys.readouterr().err


def test_help_goes_to_the_workflow_and_leaves_no_folder(capsys):
    assert cli.main(["run", write(PARSES), "--help"]) == 0
    said = capsys.readouterr()
    assert "usage: steering run work.py [-h] [--ranks RANKS]" in said.out
    assert "A workflow of one dial." in said.out
    assert said.err == ""
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_wrong_arguments_of_the_workflow_leave_no_folder(capsys):
    assert cli.main(["run", write(PARSES), "--out", "out", "--ranks", "many"]) == 2
    told = capsys.readouterr().err
    assert "invalid int value: 'many'" in told
    assert told.splitlines()[-1] == "steering: the workflow did not begin: its folder out is removed again"
    assert not Path("out").exists()


def test_a_workflow_that_exits_late_has_failed():
    leaves = GOOD + "    raise SystemExit(3)\n"
    assert cli.main(["run", write(leaves), "--out", "out"]) == 3
    assert (RunFolder("out").summary()["status"], RunFolder("out").summary()["reason"]) == ("failed", "left with 3")


def test_a_class_of_the_workflow_may_be_a_dataclass():
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    b: int\n"
    assert cli.main(["run", write(source + GOOD), "--out", "out"]) == 0


def test_report_writes_again_compares_and_refuses(capsys):
    write(GOOD)
    for name in ("one", "two"):
        cli.main(["run", "work.py", "--out", name])
    Path("one/report.html").unlink()
    capsys.readouterr()
    assert cli.main(["report", "one"]) == 0
    assert Path("one/report.html").is_file()
    assert cli.main(["report", "one", "two"]) == 0
    assert cli.main(["report", "one", "two", "--out", "both.html"]) == 0
    assert capsys.readouterr().out.split() == ["one/report.html", "comparison.html", "both.html"]
    assert "one (finished), two (finished)" in Path("both.html").read_text()
    assert cli.main(["report", "nothing"]) == 1
    assert "found no such folder, expected the folder of a run" in capsys.readouterr().err


def test_status_tells_how_a_run_stands(capsys):
    write(FAILS)
    cli.main(["run", "work.py", "--out", "out"])
    capsys.readouterr()
    assert cli.main(["status", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"out: failed after \d+ s: found 3 frames, expected 4: measure one more", lines[0])
    folder = RunFolder.create("live")
    for event in (
        {"event": "ChunkArrived", "scan": "zinc", "frame_ids": [1, 2, 3]},
        {"event": "PredictionReady", "scan": "zinc", "frame_ids": [1, 2], "version": 1, "residual": 0.3},
        {"event": "ModelPublished", "version": 1, "validation_error": 0.2, "validation_residual": 0.05},
        {"event": "DriftRaised", "scan": "zinc", "residual": 0.3, "expected": 0.05},
    ):
        folder.append_event({"time": 0.0, **event})
    folder.write_summary({"scans": ["iron", "zinc"]})
    assert cli.main(["status", "live"]) == 0
    text = capsys.readouterr().out
    for words in (
        "live: running for ",
        "zinc (number 2 of 2)",
        "3 acquired, 2 predicted",
        "version 1, validation error 0.200, 1 published",
        "residual 0.300, 0.050 expected, DRIFT",
        "DriftRaised",
    ):
        assert words in text, words
    folder.end("finished")
    assert cli.main(["status", "live"]) == 0
    assert "0.050 expected, drift not over at the last frame" in capsys.readouterr().out


@pytest.mark.parametrize("area", ["a,b,c,d", "0,1,2", "0,1,2,3,4", "1,0,0,1", "nan,1,0,1"])
def test_an_area_that_is_none_is_refused_in_words(capsys, area):
    assert cli.main(["limit", "live", f"--area={area}"]) == 1
    assert f"found --area={area}, expected four numbers, low before high: --area=Y0,Y1,X0,X1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "report", "status"])
def test_help_is_there_for_every_command(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert f"usage: steering {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main([command])


def test_without_a_command_there_is_the_help_and_with_version_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert "usage: steering" in shown
    for words in ([], ["--log", "text"]):
        assert cli.main(words) == 0
        assert capsys.readouterr() == (shown, "")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"steering {__version__}\n"


@pytest.mark.slow
def test_the_command_line_itself_answers_without_the_heavy_libraries():
    heavy = (
        "import sys; import steering.cli; print([m for m in ('torch', 'dask', 'xarray', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_failing_run_shows_no_traceback_and_exits_with_1():
    done = steering("run", write(FAILS), "--out", "out")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "steering: work.py failed: found 3 frames" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_a_run_that_is_stopped_closes_down_says_so_and_is_reported(number, name, code):
    command = [sys.executable, "-m", "steering.cli", "run", write(WAITS), "--out", "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "run folder" in process.stdout.readline()
        assert process.stdout.readline() == "measuring\n"
        assert command_line.said("status", "out")[0].startswith("out: running for")
        process.send_signal(number)
        said, complained = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.splitlines() == ["closed down", "report: out/report.html"]
    assert complained == f"steering: work.py was interrupted: stopped by {name}\n"
    summary = RunFolder("out").summary()
    assert (summary["status"], summary["reason"]) == ("interrupted", f"stopped by {name}")
    assert RunFolder("out").events()[-1]["status"] == "interrupted"
    assert "was interrupted before its end" in Path("out/report.html").read_text()


@pytest.mark.slow
def test_a_run_killed_outright_is_told_as_gone():
    command = [sys.executable, "-m", "steering.cli", "run", write(WAITS), "--out", "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.readline()
        process.kill()
    assert "out: ended without a message" in command_line.said("status", "out")[0]


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_folder_says_how_the_run_ended(here):
    disk = here / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {tried.stderr.strip()}")
    try:
        fills = "def main(folder, arguments):\n    while True:\n        folder.append_event({'event': 'x' * 5000})\n"
        out, err = command_line.said("run", write(fills), "--out", disk / "run", code=1)
        assert "Traceback" not in out + err
        assert "found a full disk, expected room for the run: free some space" in err
        assert RunFolder(disk / "run").summary()["status"] == "failed"
        assert RunFolder(disk / "run").events()[-1]["event"] == "RunEnded"
        hidden = {path.name for path in (disk / "run").iterdir() if path.name.startswith(".")}
        assert hidden <= {".driver.lock"}  # no draft of a file that could not be written
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
