"""The terminal display: quiet lines for a log, one picture of the state for a person."""

import asyncio
import contextlib
import io
import os
import pty
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime

import pytest
from rich.console import Console

from steering.campaign import (
    Campaign,
    Command,
    DecisionProposed,
    DecisionSettled,
    ModelPublished,
    RolledBack,
    encode,
)
from steering.runner import RunFolder
from steering.runner.client import show_all
from steering.runner.describe import describe, proposal
from steering.runner.metrics import Metrics, snapshot
from steering.runner.runner import Runner
from steering.view.display import draw, sparkline
from steering.view.progress import KEPT, Progress, Residuals
from steering.view.status import status_lines
from tests.campaigns import handled
from tests.test_campaign import SETTINGS, candidate, chunk, command, decision, labels, predicted, published
from tests.test_runner import experiment

WHOLE = {
    "elapsed_s": 65.0,
    "status": "running",
    "scan": "coins",
    "scan_index": 1,
    "scans_total": 3,
    "frames_acquired": 812,
    "frames_expected": 1500,
    "frames_predicted": 810,
    "frames_dropped": 0,
    "frames_per_s": 50.2,
    "version": 7,
    "versions_published": 7,
    "residual": 0.31,
    "residual_expected": 0.05,
    "drift": True,
    "training": True,
    "steps": 1240,
    "loss": 0.031,
    "labels": 400,
    "buffer_samples": 3100,
    "buffer_share": 0.62,
    "remote_share": 0.5,
    "reason": "farthest from every\nmeasured [position]",
    "events": [(61.0, "new sample: coins"), (62.0, "drift raised")],
}


def plain(snapshots):
    out = io.StringIO()
    progress = Progress(out)
    for each in snapshots:
        progress.show(each)
    progress.close()
    return out.getvalue()


def test_plain_lines_hold_no_escape_codes_and_come_every_five_seconds():
    text = plain({"elapsed_s": tenth / 4, "frames_acquired": tenth, "scan": "a"} for tenth in range(81))
    lines = text.splitlines()
    assert "\x1b" not in text
    assert "\r" not in text
    assert [line.split()[0] for line in lines] == ["0:00", "0:00", "0:05", "0:10", "0:15", "0:20"]
    assert lines[0] == "0:00  * new sample: a"
    assert "20 frames" in lines[2]


def test_plain_lines_tell_each_event_once():
    first = {"elapsed_s": 0.0, "events": [(0.0, "new sample: a")]}
    second = {"elapsed_s": 0.2, "events": [(0.0, "new sample: a"), (0.1, "rank 1 lost")]}
    text = plain([first, second, second])
    assert text.count("new sample: a") == 1
    assert text.count("rank 1 lost") == 1


def test_plain_lines_find_what_changed_where_the_run_keeps_no_list():
    states = [
        {"elapsed_s": 0.0, "scan": "a", "version": 0, "status": "running"},
        {"elapsed_s": 1.0, "scan": "b", "version": 0, "status": "running"},
        {"elapsed_s": 2.0, "scan": "b", "version": 0, "status": "running", "drift": True},
        {"elapsed_s": 3.0, "scan": "b", "version": 1, "status": "running", "drift": False},
        {"elapsed_s": 4.0, "scan": "b", "version": 1, "status": "finished"},
    ]
    text = plain(states)
    for note in ("new sample: b", "drift: trust fell", "trust is back", "model version 1 is in service", "finished"):
        assert text.count(note) == 1, note


def test_a_run_that_has_ended_gives_no_alarm():
    """Drift is judged by frames, and none comes any more: the residual beside it may be that of a better version."""
    told = {"elapsed_s": 4.0, "status": "finished", "residual": 0.1, "residual_expected": 0.15, "drift": True}
    for text in (plain([told]), drawn(told)):
        assert "DRIFT" not in text
        assert "drift not over at the last frame" in text
    assert "drift" not in plain([told | {"drift": False}])
    assert "no drift" in drawn(told | {"drift": False})


def test_a_run_that_waits_for_a_person_says_so_what_for_and_how_long():
    """In the display of a narrow terminal, in the lines of a log, and in the list of events."""
    campaign = Campaign(settings=replace(SETTINGS, approval_s=600.0, unanswered="veto"))
    metrics = Metrics(experiment(), campaign)
    now = time.time()
    for event in (published(0, residual=None), replace(decision(3), time=now)):
        handled(campaign, event)
    metrics.note(campaign.raised[-1])
    source = {"acquire_s": 1.0, "frames_acquired": 0, "frames_dropped": 0, "streams": {}}
    predictor = {"version": 0, "latency_ms": {}, "predict_s": 0.0}
    told = snapshot(metrics, source, predictor)
    assert 595 < told["waits"]["left_s"] <= 600
    for text in (plain([told]), drawn(told, width=80)):
        assert "waits for approval" in text
        assert "`steering approve` or veto, 9:5" in text
        assert "left, else veto: 3 positions" in text
        assert "waits for approval (steering approve): 3 positions" in text
    handled(campaign, command("pause"))
    for text in (plain([snapshot(metrics, source, predictor)]), drawn(snapshot(metrics, source, predictor), width=80)):
        assert "paused, waits for approval" in text
        assert "`steering resume`; `steering approve` or veto" in text
    handled(campaign, command("veto"))
    paused = {**snapshot(metrics, source, predictor), "events": []}
    for text in (plain([paused]), drawn(paused, width=80)):
        assert "paused  " in text or "paused ─" in text
        assert "approv" not in text
    for text in (plain([told | {"status": "finished"}]), drawn(told | {"status": "finished", "events": []})):
        assert "left, else" not in text


def test_an_empty_snapshot_is_shown():
    assert "running" in plain([{}])
    assert "waiting for the first frame" in drawn({})


def drawn(snapshot, width=120, trust=()):
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(draw(snapshot, trust))
    return console.export_text()


def test_the_display_tells_everything_it_knows():
    text = drawn(WHOLE, trust=[(0.05, False)] * 20 + [(0.3, True)] * 4)
    for word in (
        "coins",
        "2 of 3",
        "812 of 1,500",
        "50/s",
        "version 7",
        "0.310",
        "0.050 expected",
        "DRIFT",
        "1,240 steps",
        "0.031",
        "3,100 samples",
        "62% full",
        "50% of other ranks",
        "farthest from every measured [position]",
        "new sample: coins",
        "drift raised",
        "1:05",
    ):
        assert word in text, word


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_display_fits_the_terminal(width):
    lines = drawn(WHOLE, width).rstrip("\n").splitlines()
    assert max(len(line.rstrip()) for line in lines) <= min(width, 100)
    assert len(lines) < 20


@pytest.mark.parametrize("key", sorted(WHOLE))
def test_any_figure_may_be_unknown(key):
    drawn({name: value for name, value in WHOLE.items() if name != key})
    drawn({**WHOLE, key: None})
    assert "\x1b" not in plain([{**WHOLE, key: None}])


def test_the_sparkline_rises_with_the_residual_and_marks_alarms():
    line = sparkline([(place / 10, place > 7) for place in range(10)], width=10)
    assert line.plain == "".join(sorted(line.plain))
    assert [span.style for span in line.spans].count("red") == 2


def test_the_residuals_of_a_long_run_stay_bounded():
    residuals = Residuals()
    for step in range(20 * KEPT):
        residuals.add({"residual": step, "drift": step == 5})
    values = residuals.values
    assert KEPT // 2 <= len(values) <= KEPT
    assert [value for value, _ in values] == sorted(value for value, _ in values)
    assert sum(alarm for _, alarm in values) == 1


def test_in_a_terminal_the_display_is_drawn_in_place_and_gives_the_cursor_back():
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        progress = Progress(terminal)
        with pytest.raises(KeyboardInterrupt):
            show_all(interrupted(), progress)
        terminal.write("report: run/report.html\n")
    text = written(ours)
    assert "steering" in text
    assert 0 <= text.find("\x1b[?25l") < text.find("\x1b[?25h")
    assert text.splitlines()[-1].endswith("report: run/report.html")
    assert "╯" not in text.splitlines()[-1]


def interrupted():
    yield WHOLE
    raise KeyboardInterrupt


def test_a_version_that_nothing_could_judge_is_told_in_words():
    for unknown in (None, float("nan")):
        told = describe(ModelPublished(time=0.0, version=13, validation_error=unknown, validation_residual=None))
        assert told == "model 13 published, validation error unknown: no held-out frame was labelled"


@pytest.mark.parametrize(("frames", "told"), [(1, ", 1 validation frame"), (36, ", 36 validation frames"), (None, "")])
def test_a_published_version_says_how_many_frames_judged_it(frames, told):
    event = ModelPublished(
        time=0.0, version=3, validation_error=0.25, validation_residual=0.1, validation_frames=frames
    )
    assert describe(event) == f"model 3 published, validation error 0.2500{told}"


def written(descriptor):
    """All that was written to a terminal whose other side is closed."""
    text = b""
    with os.fdopen(descriptor, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        while piece := terminal.read(4096):
            text += piece
    return text.decode()


def test_every_display_counts_from_the_start_of_the_run(tmp_path):
    """Not from that of its campaign, which comes when its workers are there; and not from a clock that is ahead."""
    folder = RunFolder.create(tmp_path / "run")
    began = time.time() - 3600
    folder.write_summary({"started": datetime.fromtimestamp(began).astimezone().isoformat()})
    runner = Runner(experiment(), folder)
    assert runner.metrics.begun == folder.started == pytest.approx(began, abs=1e-3)
    assert 3600 <= asyncio.run(runner.snapshot())["elapsed_s"] < 3660
    assert status_lines(folder)[0].startswith("run: running for 1 h 0 min")
    folder.write_summary({"started": datetime.fromtimestamp(time.time() + 3600).astimezone().isoformat()})
    assert folder.started <= time.time()


def test_the_status_tells_a_proposal_in_the_words_of_the_display(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    asked = DecisionProposed(time=0.0, positions=0, reason="enough", stop=True, until=time.time() + 50, default="veto")
    folder.append_event(encode(asked))
    (waits,) = (line for line in status_lines(folder) if line.startswith("  waits"))
    assert f"{proposal(asked)}; approve or veto within" in waits
    folder.append_event(encode(DecisionSettled(time=1.0, approved=True, by="a person")))
    folder.append_event(encode(Command(time=2.0, name="pause")))
    assert "  waits    paused: continue with `steering resume`" in status_lines(folder)


def test_the_status_names_the_figures_of_the_display(tmp_path):
    """The residual of the newest chunk, and what is expected of the version in service: an older one that came back."""
    campaign, folder = Campaign(settings=SETTINGS), RunFolder.create(tmp_path / "run")
    metrics = Metrics(experiment(), campaign)
    for event in (
        published(0, residual=None),
        *(decision(100), chunk(20), labels()),
        *(candidate(), published(1, residual=0.05)),
        *(candidate(), published(2, residual=0.03)),
        predicted(0.5, version=2, frames=9),
        *(command("rollback"), RolledBack(time=0.0, version=1, validation_residual=0.05, reason="a person's wish")),
        replace(predicted(0.5, frames=1), residual=0.4),
    ):
        handled(campaign, event)
        metrics.note(event)
        folder.append_event(encode(event))
    source = {"acquire_s": 1.0, "frames_acquired": 20, "frames_dropped": 0, "streams": {}}
    shown = drawn(snapshot(metrics, source, {"version": 1, "latency_ms": {}, "predict_s": 0.0}))
    status = "\n".join(status_lines(folder))
    for text in (shown, status):
        assert "residual 0.400" in text
        assert "0.050 expected" in text
        assert "version 1" in text
        assert "2 published" in text


SHOWS = """
import time
from steering import Progress

def main(folder, arguments):
    progress = Progress()
    for k in range(20):
        progress.show({"elapsed_s": 6.0 * k})
        time.sleep(0.02)
    progress.close()
    print("the workflow's own last words")
    (folder.path / "whole").touch()
"""


@pytest.mark.parametrize("ending", ["2>errors | head -3", "2>&1 | head -3", "2>errors | true", "2>errors >&-"])
def test_a_run_goes_on_to_its_end_when_nobody_reads_what_it_prints(tmp_path, ending):
    (tmp_path / "shows.py").write_text(SHOWS)
    command = f"{shlex.quote(sys.executable)} -m steering.cli run --out run shows.py {ending}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "whole").exists()
    assert RunFolder(tmp_path / "run").summary()["status"] == "finished"
    said = done.stderr + ((tmp_path / "errors").read_text() if "errors" in ending else "")
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_a_terminal_that_is_closed_does_not_end_the_run():
    person, ours = pty.openpty()
    with os.fdopen(ours, "w") as terminal:
        progress = Progress(terminal)
        progress.show(WHOLE)
        os.close(person)
        for _ in range(3):
            progress.show(WHOLE)
        progress.close()
        print("later words", file=terminal, flush=True)
    assert sys.stdout is not terminal
