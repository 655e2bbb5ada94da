"""Runs that nobody starts by hand: exit codes, silence, and the lines for cron, systemd and SLURM in workflows/."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from steering import cli
from steering.runner.folder import RunFolder
from tests.test_cli import FAILS, GOOD, write

ROOT = Path(__file__).parents[1]
SCHEDULES = ROOT / "workflows" / "schedules"
STEERING = Path(sys.executable).parent / "steering"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["steering"])
    return tmp_path


@pytest.mark.parametrize("code", [0, 75])
def test_a_workflow_with_nothing_to_do_leaves_no_folder(capsys, code):
    source = (
        f"import sys\ndef main(folder, arguments):\n    print('nothing is new', file=sys.stderr)\n    return {code}\n"
    )
    assert cli.main(["run", "--quiet", write(source)]) == code
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "nothing is new\n")
    assert list(Path("runs").iterdir()) == []


@pytest.mark.parametrize(("code", "status"), [(0, "finished"), (1, "failed"), (75, "failed")])
def test_the_number_that_main_returns_is_the_exit_code(capsys, code, status):
    assert cli.main(["run", "--out", "out", write(GOOD + f"    return {code}\n")]) == code
    assert RunFolder("out").summary()["status"] == status
    assert ("its main returned" in capsys.readouterr().err) == bool(code)


def test_a_quiet_run_prints_nothing_and_keeps_what_it_said(capsys):
    assert (
        cli.main(["run", write("def main(folder, arguments):\n    print('measuring')\n"), "--quiet", "--out=out"]) == 0
    )
    assert capsys.readouterr() == ("", "")
    assert Path("out/run.log").read_text().splitlines() == ["run folder: out", "measuring", "report: out/report.html"]


def test_a_quiet_run_that_fails_says_so(capsys):
    assert cli.main(["run", "--quiet", "--out", "out", write(FAILS)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "work.py failed: found 3 frames" in said.err


# The lines themselves.


def rendered(name: str, folder: Path) -> str:
    """A file of workflows/schedules with the real paths in it."""
    text = (SCHEDULES / name).read_text()
    return text.replace("/opt/steering/.venv/bin/steering", str(STEERING)).replace("/opt/steering", str(folder))


def cron_line(text: str) -> str:
    [line] = [line for line in text.splitlines() if line and not line.startswith("#")]
    return line


def test_every_line_names_a_workflow_that_is_there():
    for name in ("crontab", "scrontab"):
        line = cron_line((SCHEDULES / name).read_text())
        assert re.match(r"30 2 \* \* \*\s", line)
        [workflow] = re.findall(r"workflows/\w+\.py", line)
        assert (ROOT / workflow).is_file()


def test_scrontab_lines_are_whole():
    """Debian has no scrontab: the lines are read as its page describes them."""
    lines = (SCHEDULES / "scrontab").read_text().splitlines()
    options = [line for line in lines if line.startswith("#SCRON")]
    assert all(re.fullmatch(r"#SCRON --[a-z-]+=\S+", line) for line in options)
    assert {option.split("=")[0].removeprefix("#SCRON --") for option in options} >= {"partition", "time", "chdir"}
    assert lines.index(cron_line("\n".join(lines))) == max(lines.index(option) for option in options) + 1


@pytest.fixture
def batch(here, monkeypatch):
    """Runs driver.sbatch as SLURM would, with commands that only say what they are asked: what they were asked, and the
    exit code."""
    script = SCHEDULES / "driver.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    for name, then in (
        ("steering", "exit ${CODE:-0}"),
        ("sbatch", 'echo "RUN=$STEERING_RUN SEED=$STEERING_SEED ${SLURM_ARRAY_JOB_ID:-none}" >>asked; echo 99'),
        ("scancel", ""),
        ("squeue", "echo 4:00:00"),
    ):
        (here / name).write_text(f'#!/bin/bash\necho {name} "$@" >>asked\n{then}\n')
        (here / name).chmod(0o755)
    path = {"PATH": f"{here}:{os.environ['PATH']}", "STEERING": str(here / "steering"), "SLURM_JOB_PARTITION": "debug"}

    def run(*words, **environment):
        (here / "asked").unlink(missing_ok=True)
        done = subprocess.run(["bash", str(script), *words], env=path | environment, check=False)
        asked = here / "asked"
        return (asked.read_text() if asked.exists() else ""), done.returncode

    return run


WORDS = ("workflows/class_incremental.py", "--ranks", "4")


def test_the_batch_script_submits_its_successor_and_hands_its_arguments_on(batch):
    asked, code = batch(*WORDS, SLURM_JOB_ID="7")
    run, site = "runs/class_incremental-7", "--cluster slurm:workflows/site.toml"
    script = f"{SCHEDULES}/driver.sbatch {' '.join(WORDS)}"
    assert asked.splitlines() == [
        "squeue --noheader --job=7 --format=%l",
        f"sbatch --parsable --dependency=afterany:7 --partition=debug --time=4:00:00 {script}",
        f"RUN={run} SEED= none",
        f"steering run --out {run} workflows/class_incremental.py {site} --ranks 4",
        "scancel 99",  # the run has ended
    ]
    assert code == 0
    asked, _ = batch(*WORDS, SLURM_JOB_ID="8", SLURM_ARRAY_JOB_ID="8", SLURM_ARRAY_TASK_ID="2")
    assert "--dependency=afterany:8_2" in asked
    assert "RUN=runs/class_incremental-8-2 SEED=2 none" in asked
    assert f"{site} --seed 2 --ranks 4" in asked


@pytest.mark.parametrize(("left", "cancelled"), [(143, False), (137, False), (1, True)])
def test_the_successor_waits_only_for_a_driver_that_a_signal_has_ended(batch, left, cancelled):
    asked, code = batch(*WORDS, SLURM_JOB_ID="7", CODE=str(left))
    assert code == left
    assert ("scancel 99" in asked) == cancelled


def test_the_successor_goes_on_with_a_run_that_was_left_and_with_no_other(batch):
    folder = RunFolder.create("runs/a")
    asked, _ = batch(*WORDS, SLURM_JOB_ID="9", STEERING_RUN="runs/a")
    assert "steering recover runs/a\n" in asked
    assert "RUN=runs/a " in asked
    folder.end("finished")
    assert batch(*WORDS, SLURM_JOB_ID="9", STEERING_RUN="runs/a") == ("", 0)


@pytest.mark.slow
def test_systemd_takes_the_units(here):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("this machine has no systemd-analyze")
    for kind in ("service", "timer"):
        (here / f"steering-nightly.{kind}").write_text(rendered(f"steering-nightly.{kind}", ROOT))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, here.glob("steering-*"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    [when] = re.findall(r"OnCalendar=(.*)", (SCHEDULES / "steering-nightly.timer").read_text())
    subprocess.run(["systemd-analyze", "calendar", when], check=True, capture_output=True)


@pytest.fixture
def cron(here: Path) -> Iterator[Path]:
    """A file of /etc/cron.d for which cron is started once it is written."""
    if os.geteuid() != 0 or shutil.which("cron") is None:
        pytest.skip("starting cron needs root and Debian's package cron")
    pid_file = Path("/var/run/crond.pid")
    with open(pid_file, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pytest.skip("a cron runs here already")
    started = Path("/var/run/crond.reboot")  # with it, cron would take itself for started before
    kept = started.exists()
    started.unlink(missing_ok=True)
    table = Path(f"/etc/cron.d/steering-test-{os.getpid()}")
    try:
        yield table
    finally:
        table.unlink(missing_ok=True)
        if kept:
            started.touch()


@pytest.mark.slow
@pytest.mark.xdist_group("cron")
def test_a_night_works_in_crons_environment(here, cron):
    """The line of the file, at cron's start instead of at night: nearly no environment, and another working folder. Of
    what is wrong it tells, and only of that; where there is nothing to learn it leaves no folder."""
    line = cron_line(rendered("crontab", here)).partition("cd ")[2].replace(".venv/bin/steering", str(STEERING))
    (here / "workflows").symlink_to(ROOT / "workflows")
    broken = here / "runs" / "broken"
    broken.mkdir(parents=True)
    (broken / "summary.json").write_text("[")
    # As installed: the package is found by the Python that runs it, in this checkout by its path.
    said, code = here / "said", here / "code"
    noted = f"echo $? >{code}.new; mv {code}.new {code}"
    cron.write_text(f"PYTHONPATH={ROOT}\n@reboot root cd {line} >{said} 2>&1; {noted}\n")
    cron.chmod(0o644)
    daemon = subprocess.Popen(["cron", "-f"], stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while not code.exists():
            assert time.monotonic() < deadline, said.read_text() if said.exists() else list(here.rglob("*"))
            time.sleep(0.1)
    finally:
        daemon.terminate()
        daemon.wait(timeout=30)
    assert code.read_text() == "0\n", said.read_text()
    [complaint] = said.read_text().splitlines()
    assert complaint.startswith("broken cannot be read")
    assert {path.name for path in (here / "runs").iterdir()} == {"broken", ".memory.nightly.lock"}
