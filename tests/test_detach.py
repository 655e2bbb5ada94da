"""Runs that nobody has to stay with: detached, attached to, listed, and ended by whoever is there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from distributed import Client, LocalCluster
from distributed.security import Security

from steering import cli
from steering.clusters import credentials
from steering.clusters.local import quiet
from steering.commands import detach
from steering.runner import attach, detached
from steering.runner.attach import Attached
from steering.runner.checks import refuse_hidden, refuse_taken
from steering.runner.folder import RunFolder
from steering.runner.liveness import ended, gone, there
from steering.view.listing import listing
from tests.test_cli import FAILS, PARSES, WAITS, write

ROOT = Path(__file__).parents[1]
DEAD = 2**22 + 1
"""No process has this number."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["steering"])
    return tmp_path


def until(true, what, seconds=90):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return found


# What is alive, without a process.


def run_of(name, **summary):
    folder = RunFolder.create(name)
    folder.write_summary(summary)
    return folder


def scheduler(folder, **where):
    told = {"address": "tcp://127.0.0.1:9", "runner": "steering-campaign", **where}
    folder.write_file("scheduler.json", json.dumps(told).encode())


def test_a_run_lives_as_long_as_its_runner_whoever_started_it():
    folder = run_of("run", pid=DEAD)
    assert gone(folder)
    scheduler(folder, pid=os.getpid(), host=socket.gethostname())
    assert not gone(folder)
    scheduler(folder, pid=DEAD, host=socket.gethostname())
    assert gone(folder)
    folder.write_summary({"pid": os.getpid()})  # the driver still writes the report, say
    assert not gone(folder)


def test_a_run_of_another_machine_lives_as_long_as_its_cluster_is_reached():
    folder = run_of("run", pid=DEAD, host="elsewhere")
    assert not gone(folder)  # it has not begun: nobody here can know
    with socket.create_server(("127.0.0.1", 0)) as server:
        # An address of this machine that does not look like one.
        scheduler(folder, address=f"tls://0.0.0.0:{server.getsockname()[1]}", pid=1, host="node7")
        assert not gone(folder)
        with pytest.raises(RuntimeError, match="found a campaign that goes on"):
            refuse_taken(folder)
        refuse_taken(RunFolder(folder.path, recovering=True))  # its runner is lost, and the cluster there
    assert gone(folder)
    assert "ended without a message" in ended(folder)


def test_a_run_whose_cluster_only_its_own_machine_reaches_is_not_called_dead_elsewhere(capsys):
    folder = run_of("run", pid=DEAD, host="node7")
    scheduler(folder, pid=1, host="node7")
    assert not gone(folder)
    with pytest.raises(RuntimeError, match="found a campaign that goes on"):
        refuse_taken(folder)
    with pytest.raises(RuntimeError, match="found a run on node7 whose cluster listens to that machine alone"):
        attach(folder)
    for words in (["status", "run"], ["list", "."]):
        assert cli.main(words) == 0
        assert "(on node7: ask there)" in capsys.readouterr().out
    assert cli.main(["stop", "run"]) == 0
    assert "noted: run is on node7, and its runner there ends it" in capsys.readouterr().out


class Asked:
    """A runner that says its name to whoever asks it for anything."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, _verb):
        return lambda *words, **named: self

    def result(self, timeout):
        assert timeout
        return self.name


@pytest.mark.parametrize(
    "asks", [Attached.snapshot, Attached.live, Attached.page_update, lambda run: run.command("pause")]
)
def test_whatever_is_asked_is_asked_of_the_next_runner_once_there_is_one(monkeypatch, asks):
    folder = run_of("run")
    scheduler(folder, key="a")
    run = Attached(Asked("first"), folder, key="a")
    next_one = Attached(Asked("second"), folder, key="b")
    monkeypatch.setattr(sys.modules["steering.runner.attach"], "attach", lambda folder, insecure: next_one)
    assert asks(run) == "first"
    (folder.path / "scheduler.json").unlink()  # it hands over
    assert asks(run) == "first"
    scheduler(folder, key="b")
    assert asks(run) == "second"


@pytest.mark.parametrize(
    ("status", "said"),
    [("finished", "a run that finished"), ("failed", "a run that failed: no beam"), ("running", "ended without a me")],
)
def test_attaching_to_a_run_that_is_over_says_how_it_ended(status, said):
    folder = run_of("run", pid=DEAD)
    if status != "running":
        folder.end(status, "no beam" if status == "failed" else "")
    with pytest.raises(RuntimeError, match=said) as refused:
        attach("run")
    assert "expected one that goes on" in str(refused.value)


def test_attaching_says_what_is_missing(monkeypatch):
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        attach("nothing")
    folder = run_of("run")
    with pytest.raises(RuntimeError, match=r"found no scheduler\.json"):
        attach(folder)
    scheduler(folder, credentials="credentials")
    with pytest.raises(PermissionError, match=r"steering status .* shows the run without them"):
        attach(folder)
    credentials.make(folder.path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as another user sees it; root may read everything
    with pytest.raises(PermissionError, match="expected those of the user who started it"):
        attach(folder)


def test_attaching_to_a_run_that_has_ended_says_how(capsys):
    folder = run_of("run")
    folder.end("finished")
    assert cli.main(["attach", "run"]) == 0
    assert capsys.readouterr() == ("run finished: `steering status run` says what it left\n", "")
    failed = run_of("other")
    failed.end("failed", "no beam")
    assert cli.main(["attach", "other"]) == 1
    assert "found a run that failed: no beam" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_run_of_another_user_is_connected_to_only_where_somebody_says_so(capsys):
    """Whoever has its cluster could execute code here: Dask unpickles what a scheduler sends."""
    folder = run_of("run")
    scheduler(folder, pid=os.getpid(), host=socket.gethostname())
    os.chown(folder.path / "scheduler.json", 4711, -1)
    for words in (["attach", "run"], ["pause", "run"], ["stop", "run"]):
        assert cli.main(words) == 1
        said = capsys.readouterr().err
        assert "found a run of another user (number 4711)" in said
        assert "say --insecure" in said
    with pytest.raises(RuntimeError, match="found no scheduler at tcp:"):
        attach(folder, insecure=True)


ANOTHER_USER = """
import contextlib, io, json, os, sys
from steering import cli
from steering.commands import attach
from steering.runner import attach, client
from steering.view import listing, progress, report, status

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
told = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        told.append([cli.main(words), out.getvalue()])
print(json.dumps(told))
"""


@pytest.mark.slow
def test_a_user_without_rights_looks_and_takes_no_part():
    """Another user's process: status and list are read, attach and commands are refused in words, nothing is left."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    with tempfile.TemporaryDirectory() as there:
        os.chmod(there, 0o755)
        folder = run_of(f"{there}/run")
        scheduler(folder, credentials="credentials", pid=os.getpid(), host=socket.gethostname())
        credentials.make(folder.path)
        asked = [[word, str(folder.path)] for word in ("status", "attach", "pause", "stop", "report")]
        command = [sys.executable, "-c", ANOTHER_USER, json.dumps([["list", there], *asked])]
        before = sorted(folder.path.rglob("*"))
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (listed, runs), (looked, state), *refused, report = json.loads(done.stdout)
        assert (listed, looked) == (0, 0)
        assert "running for" in runs
        assert "run: running for" in state
        for code, said in refused:
            assert code == 1
            assert (
                "found no permission to read the run's credentials, expected those of the user who started it" in said
            )
            assert f"`steering status {folder.path}` shows the run without them" in said
        assert report[0] == 1
        assert "found no permission to write, expected a folder of your own" in report[1]
        assert sorted(folder.path.rglob("*")) == before


def test_credentials_are_for_their_owner_alone(here):
    security = credentials.make(here)
    folder = here / credentials.FOLDER
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert security.get_connection_args("client")["require_encryption"]
    key = (folder / "key.pem").read_text()
    assert key not in repr(security)


def test_credentials_hold_where_a_clock_is_hours_behind(here):
    credentials.make(here)
    certificate = x509.load_pem_x509_certificate((here / credentials.FOLDER / "cert.pem").read_bytes())
    now = datetime.now(UTC)
    assert certificate.not_valid_before_utc < now - timedelta(hours=14)  # the local time taken for UTC
    assert certificate.not_valid_after_utc > now + timedelta(days=300)


def test_credentials_of_another_run_are_refused_in_words(here):
    folder, other = run_of("run"), run_of("other")
    credentials.make(folder.path)
    security = credentials.make(other.path)
    options = {"protocol": "tls://", "security": security, "dashboard_address": "127.0.0.1:0"}
    with quiet(), LocalCluster(n_workers=0, host="127.0.0.1", **options) as there:
        where = {"address": there.scheduler_address, "credentials": "credentials"}
        scheduler(folder, **where, pid=os.getpid(), host=socket.gethostname())
        scheduler(other, **where, pid=os.getpid(), host=socket.gethostname())
        with pytest.raises(RuntimeError, match="expected those of this run"):
            attach(folder)
        with pytest.raises(RuntimeError, match=r"found no scheduler at tls:.* that knows the run .KeyError"):
            attach(other)
        where["credentials"] = str(other.path / "credentials")  # of a cluster that was there before the run
        scheduler(folder, **where, pid=os.getpid(), host=socket.gethostname())
        with pytest.raises(RuntimeError, match=r"found no scheduler at tls:.* that knows the run .KeyError"):
            attach(folder)
        del where["credentials"]
        scheduler(folder, **where, pid=os.getpid(), host=socket.gethostname())
        with pytest.raises(RuntimeError, match=r"found a cluster with TLS at tls:.* and no credentials for it"):
            attach(folder)


def test_a_cluster_is_reached_by_the_credentials_that_its_client_was_opened_with(here, monkeypatch):
    credentials.make(here)
    security = credentials.security_in(here / "credentials")
    assert credentials.folder_of(security) == here / "credentials"
    assert credentials.folder_of(Security()) is None
    assert (
        credentials.folder_of(Security(tls_ca_file="my.pem", tls_client_cert="a.pem", tls_client_key="b.pem")) is None
    )
    of_worker = Security(
        **{f"tls_worker_{kind}": getattr(security, f"tls_client_{kind}") for kind in ("cert", "key")},
        tls_ca_file=security.tls_ca_file,
    )
    assert credentials.lacks("tls://node7:1", of_worker)
    assert not credentials.lacks("tls://node7:1", credentials.as_client(of_worker))
    assert credentials.folder_of(credentials.as_client(of_worker)) == here / "credentials"
    launched = []

    def launch(folder, words, handed_over):
        launched.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr(detached, "launch", launch)
    options = {"protocol": "tls://", "security": security, "dashboard_address": "127.0.0.1:0"}
    with (
        quiet(),
        LocalCluster(n_workers=0, host="127.0.0.1", **options) as there,
        Client(there.scheduler_address, security=security) as client,
        pytest.raises(KeyboardInterrupt),
    ):
        detached.start_detached(None, client, run_of("run"))
    address = there.scheduler_address
    assert launched == [["--handed-over", address, "-", "--insecure", f"--credentials={here / 'credentials'}"]]


def test_two_runs_in_one_folder_are_refused(here):
    folder = run_of("run", pid=DEAD)
    scheduler(folder, pid=os.getpid(), host=socket.gethostname())
    with pytest.raises(RuntimeError, match="found a campaign that goes on in this folder"):
        refuse_taken(folder)
    scheduler(folder, pid=DEAD, host=socket.gethostname())
    refuse_taken(folder)


class Told:
    """A client whose one worker says what it is told to."""

    def __init__(self, seen, clock):
        self.answer = (seen, clock)

    @property
    def scheduler(self):
        return self

    def sync(self, asked, **named):
        return asked(**named)

    def identity(self, n_workers):
        return {"workers": {"tls://node7:1": {"name": "a", "resources": {"trainer": 1}}}}

    def run(self, function, mark, workers):
        assert function(mark)[0]
        return {worker: (self.answer[0], time.time() + self.answer[1]) for worker in workers}


def test_a_folder_that_workers_do_not_see_is_refused_and_clocks_that_disagree_are_said(here, caplog):
    folder = run_of("run")
    with pytest.raises(RuntimeError, match="found workers on node7 that do not see this folder"):
        refuse_hidden(Told(False, 0.0), folder)
    refuse_hidden(Told(True, 0.2), folder)
    assert caplog.text == ""
    refuse_hidden(Told(True, -90.0), folder)
    assert "found the clock of node7 90" in caplog.text
    assert not list(folder.path.glob(".seen*"))


def test_listing_finds_runs_wherever_they_are_in_the_order_of_their_beginning():
    run_of("runs/deep/second", pid=DEAD, started="2026-01-02T00:00:00+00:00")
    run_of("runs/third", started="2026-01-03T00:00:00+00:00")
    run_of("runs/first", started="2026-01-01T00:00:00+00:00").end("failed", "no beam")
    Path("runs/other").mkdir()
    Path("runs/other/summary.json").write_text("[")
    lines = listing(Path("runs"))
    assert [line.split()[0] for line in lines] == ["runs/first", "runs/deep/second", "runs/third"]
    assert "failed after" in lines[0]
    assert "ended without a message" in lines[1]
    assert "running for" in lines[2]
    assert listing(Path("runs/first/models")) == ["no runs below runs/first/models"]
    assert cli.main(["list", "nowhere"]) == 1


def test_systems_that_end_processes_at_logout_are_recognised(here, monkeypatch):
    busctl = here / "busctl"
    busctl.write_text("#!/bin/sh\necho b true\n")
    busctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(here), prepend=os.pathsep)
    monkeypatch.delenv("XDG_SESSION_ID", raising=False)
    assert detach.lingering() == ""
    monkeypatch.setenv("XDG_SESSION_ID", "3")
    assert "loginctl enable-linger" in detach.lingering()
    busctl.write_text("#!/bin/sh\necho b false\n")
    assert detach.lingering() == ""


# Real processes.


@pytest.mark.slow
def test_a_detached_workflow_goes_on_alone_and_ends_itself(capfd):
    assert cli.main(["run", "--detach", "--out", "out", write(WAITS)]) == 0
    said = capfd.readouterr().out
    assert "run folder: out\n" in said
    assert "steering attach out" in said
    folder = RunFolder("out")
    process = psutil.Process(folder.summary()["pid"])
    try:
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        assert process.parent() is not None
        process.send_signal(signal.SIGTERM)
        until(lambda: folder.summary()["status"] == "interrupted", "the end")
        until((folder.path / "report.html").exists, "the report")
    finally:
        process.kill()
    assert "measuring\nclosed down\n" in (folder.path / "run.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "arguments", "code", "said", "left"),
    [
        (FAILS, [], 1, "steering: work.py failed: found 3 frames, expected 4", True),
        (PARSES, ["--ranks", "many"], 2, "invalid int value: 'many'", False),
        ("import nothing_of_this_name\n", [], 1, "No module named 'nothing_of_this_name'", False),
    ],
)
def test_a_detached_run_that_ends_at_once_says_why(capfd, source, arguments, code, said, left):
    assert cli.main(["run", write(source), "--detach", "--out", "out", *arguments]) == code
    told = capfd.readouterr()
    assert said in told.out + told.err
    assert Path("out").exists() == left


def test_a_workflow_that_is_not_there_is_refused_as_ever(capsys):
    assert cli.main(["run", "--detach", "--out", "out", "nothing.py"]) == 1
    assert "found no such file, expected a workflow file" in capsys.readouterr().err
    assert not Path("out").exists()


KERNEL = """
import sys, time
from pathlib import Path
from steering.runner import RunFolder, start
from tests.test_runner import experiment
from dataclasses import replace

if __name__ == "__main__":
    run = start(replace(experiment(frames=400), ranks=1), "local", RunFolder.create("run"), detach=True)
    print(run.snapshot()["status"], flush=True)
    time.sleep(300)
"""


@pytest.mark.slow
def test_kill_9_of_the_driver_then_attach_then_result():
    """A notebook's kernel dies: the run does not notice, and ends with its summary and report."""
    Path("kernel.py").write_text(KERNEL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kernel = subprocess.Popen([sys.executable, "kernel.py"], stdout=subprocess.PIPE, text=True, env=environment)
    assert kernel.stdout is not None
    assert kernel.stdout.readline().strip() in ("starting", "running")
    kernel.kill()
    kernel.communicate()
    try:
        watched_to_its_end(environment)
    finally:  # else a run that nobody stays with would go on
        with contextlib.suppress(ProcessLookupError):
            os.kill(RunFolder("run").summary()["pid"], signal.SIGKILL)


def watched_to_its_end(environment):
    folder = RunFolder("run")
    assert not gone(folder)
    with attach("run") as run:
        until(lambda: run.snapshot().get("frames_acquired"), "the first frame")
        # so that it goes on until the watcher has come and left
        assert run.command("pause").startswith("pause: what is decided")
        watcher = subprocess.Popen(
            [sys.executable, "-m", "steering.cli", "attach", "run"], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert watcher.stdout is not None
        assert watcher.stdout.readline()
        watcher.send_signal(signal.SIGINT)
        said, _ = watcher.communicate(timeout=60)
        assert (watcher.returncode, said.splitlines()[-1]) == (0, "left; run goes on: `steering stop run` ends it")
        assert run.command("resume") == "resume: the policy decides again where to measure"
        figures = run.result()
    assert figures["status"] == "finished"
    assert figures["frames_predicted"] == figures["frames_acquired"] > 0
    until((folder.path / "report.html").exists, "the report")
    commands = [event for event in folder.events() if event["event"] == "Command"]
    assert [event["name"] for event in commands] == ["pause", "resume"]
    assert all(event["by"].endswith(f"@{socket.gethostname()}") for event in commands)
    until(lambda: not there(folder.summary()), "the end of its process")
    with pytest.raises(RuntimeError, match="found a run that finished"):
        attach("run")
