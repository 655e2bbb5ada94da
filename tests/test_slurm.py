"""A campaign in jobs of a real SLURM."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from threading import Thread

import psutil
import pytest

from steering.clusters import Job, Site, slurm
from steering.clusters.queue import places
from steering.models import ModelStore
from steering.runner import Experiment, RunFolder, attach, run
from steering.view.status import status_lines
from tests import slurm as real
from tests.test_runner import experiment

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]
ROOT = Path(__file__).parents[1]
SITE_FILE = ROOT / "workflows" / "site.toml"
STEERING = Path(sys.executable).parent / "steering"
SITE = Site(
    trainer=Job(memory="1500MiB"), inference=Job(memory="1500MiB"), beamline=Job(memory="1500MiB"), interface="lo"
)


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A SLURM; of several test processes each has the same one."""
    lacks = real.missing()
    if lacks:
        pytest.skip(lacks)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "slurm"
    with real.running(folder) as configuration, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(configuration))
        yield folder


@pytest.fixture(autouse=True)
def to_itself(queue: Path) -> Iterator[None]:
    with real.alone(queue):
        yield
        if squeue():  # of a test that has failed
            subprocess.run(["scancel", *squeue("--format=%i").split()], check=False)
            nothing_left()


def jobs_of(folder: RunFolder) -> list[dict]:
    return json.loads((folder.path / "jobs.json").read_text())["jobs"]


WORKFLOW = """
from steering import cluster, run
from tests.test_slurm import long_experiment

def main(folder, arguments):
    with cluster(arguments[1], ranks=2, folder=folder.path) as client:
        run(long_experiment(), client, folder)
"""


def long_experiment() -> Experiment:
    """It is stopped from outside. Labels are made once, so that the machine is not busy with them as well."""
    return replace(experiment(frames=20_000, rate=10.0, step=1.0, label_every=20_000), checkpoint_s=3.0)


@pytest.fixture
def elsewhere(queue: Path) -> str:
    """A partition of the other node; where there is one node only, of that."""
    return real.FAR if f"NodeName={real.FAR}" in (queue / "slurm.conf").read_text() else "debug"


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, RunFolder]]:
    """Submits the driver of the workflow above as a job, by the script of workflows/: its id, and the run's folder."""

    def submit(site: str, *options: str) -> tuple[str, RunFolder]:
        (tmp_path / "site.toml").write_text(site)
        (tmp_path / "work.py").write_text(WORKFLOW)
        for name, value in {"PYTHONPATH": ROOT, "STEERING": STEERING, "SITE": tmp_path / "site.toml"}.items():
            monkeypatch.setenv(name, str(value))
        script = str(ROOT / "workflows" / "schedules" / "driver.sbatch")
        driver = sbatch(f"--chdir={tmp_path}", f"--output={tmp_path}/driver-%j.log", *options, script, "work.py")
        path = tmp_path / "runs" / f"work-{driver}"
        until((path / "summary.json").exists)
        folder = RunFolder(path)
        until(lambda: named(folder, "CheckpointWritten") and len(ModelStore(folder.models).versions()) > 1)
        return driver, folder

    return submit


def test_a_campaign_goes_across_walltimes_preemption_and_cancelled_jobs(
    queue: Path, elsewhere: str, submitted: Callable[..., tuple[str, RunFolder]]
) -> None:
    """By the site file of workflows/, with TLS, driver and runner on another node than this process.

    First all jobs of the roles end at once: ranks, predictor and runner are handed over before. A rank's job is
    preempted: within its grace time the rank hands over too. Then a rank and the predictor are lost without a warning.
    At last the job of driver and scheduler is cancelled, and a stop is given while nobody is there: the next one goes
    on from the checkpoint, and takes it. No frame is lost, no job left, and the key stands in no file but its own."""
    site = SITE_FILE.read_text().replace("[trainer]", '[trainer]\npartition = "spare"')
    site = site.replace("[beamline]", f'[beamline]\npartition = "{elsewhere}"')
    driver, folder = submitted(site, f"--partition={elsewhere}")
    where = json.loads((folder.path / "scheduler.json").read_text())
    assert where["address"].startswith("tls://127.0.0.1:")
    assert where["host"] == (real.FAR if elsewhere == real.FAR else socket.gethostname())
    said = "\n".join(status_lines(folder))
    assert "running for" in said
    assert "4 run; the first ends in" in said
    assert f"2 ranks: cpu ({socket.gethostname()})" in said
    with attach(folder) as run:
        assert run.snapshot()["status"] == "running"
    assert listening({driver, *(one["job"] for one in jobs_of(folder))}) == {"127.0.0.1"}

    jobs, predictor = {one["job"] for one in jobs_of(folder)}, job_of(folder, "inference")["job"]
    for one in jobs:
        subprocess.run(["scontrol", "update", f"JobId={one}", "EndTime=now+120"], check=True)
    until(lambda: job_of(folder, "inference")["job"] != predictor and job_of(folder, "inference")["worker"])
    assert predictor in squeue("--jobs", predictor, "--states", "RUNNING")  # it still works beside its successor
    until(lambda: len(named(folder, "RunRecovered")) == 1)
    until(lambda: not jobs & {one["job"] for one in jobs_of(folder)} and all(one["worker"] for one in jobs_of(folder)))
    goes_on(folder)

    subprocess.run(["scancel", *jobs], check=True)
    until(lambda: not jobs & set(squeue("--format=%i").split()))
    handed_over = len(retired(folder))
    free = 12 - sum(map(int, squeue("--states=RUNNING", "--partition=debug,spare", "--format=%C").split()))
    urgent = sbatch("--partition=urgent", f"--cpus-per-task={free + 1}", "--mem=100", "-o/dev/null", "--wrap=sleep 600")
    until(lambda: len(retired(folder)) > handed_over)
    changes = named(folder, "GroupChanged")
    assert sum(change["samples_lost"] for change in changes) == 0
    subprocess.run(["scancel", urgent], check=True)

    until(lambda: any(change["joined"] for change in named(folder, "GroupChanged")[len(changes) :]))
    changes = named(folder, "GroupChanged")
    replaced = len(named(folder, "PredictorReplaced"))
    subprocess.run(["scancel", job_of(folder, "trainer")["job"], job_of(folder, "inference")["job"]], check=True)
    until(lambda: any(change["lost"] for change in named(folder, "GroupChanged")[len(changes) :]))
    until(lambda: len(named(folder, "PredictorReplaced")) > replaced)

    subprocess.run(["scancel", driver], check=True)
    until(lambda: driver not in squeue("--format=%i").split())
    command("stop", folder.path)
    until(lambda: folder.summary()["status"] != "running")
    whole(folder)
    assert len(named(folder, "RunRecovered")) >= 2
    assert [event["name"] for event in named(folder, "Command")] == ["stop"]
    steps = [version.steps for version in ModelStore(folder.models).versions()]
    assert steps == sorted(steps)
    nothing_left()
    secret = (folder.path / "credentials" / "key.pem").read_text().splitlines()[1]
    for file in folder.path.rglob("*"):
        if file.is_file() and file.parent.name != "credentials":
            assert secret.encode() not in file.read_bytes(), file


@pytest.mark.long
def test_a_campaign_goes_across_walltimes_that_slurm_counts_itself(
    submitted: Callable[..., tuple[str, RunFolder]],
) -> None:
    """Nobody moves an end here: the jobs of the roles have two minutes, the driver's has five.

    Each job of a role that the run begins with is ended by SLURM, after another one was submitted for its place. The
    driver ends a minute before its walltime, and the job that waits for that goes on and takes the stop. No frame is
    lost, and ranks go on with the steps and weights that they had."""
    site = SITE_FILE.read_text().replace('"00:30:00"', '"00:02:00"').replace("handover_s = 300", "handover_s = 45")
    assert '"00:02:00"' in site
    assert "handover_s = 45" in site
    driver, folder = submitted(site, "--time=5")
    first = {one["job"] for one in jobs_of(folder)}
    until(lambda: not first & set(squeue("--format=%i").split()))
    known = known_jobs()
    assert {job: known[job]["JobState"] for job in first} == dict.fromkeys(first, "TIMEOUT")
    for kind in ("trainer", "inference", "beamline"):
        of_kind = {job: facts for job, facts in known.items() if facts["JobName"] == f"steering-{kind}"}
        ends = sorted(of_kind[job]["EndTime"] for job in first & set(of_kind))
        heirs = sorted(facts["SubmitTime"] for job, facts in of_kind.items() if job not in first)
        assert heirs[len(ends) - 1] < ends[0], kind

    until(lambda: driver not in squeue("--format=%i").split())
    own = known_jobs()[driver]
    assert own["JobState"] not in ("TIMEOUT", "CANCELLED")
    assert "00:03:50" <= own["RunTime"] < "00:05:00"
    ended = datetime.fromisoformat(own["EndTime"]).timestamp()
    until(lambda: any(event["time"] > ended for event in named(folder, "RunRecovered")))
    goes_on(folder)
    recovered = named(folder, "RunRecovered")
    assert "noted" not in command("stop", folder.path)  # the runner itself has taken it
    until(lambda: folder.summary()["status"] != "running")
    nothing_left()
    assert named(folder, "RunRecovered") == recovered  # it has ended in the jobs that were there
    drivers = {job: facts["JobState"] for job, facts in known_jobs().items() if facts["JobName"] == "steering"}
    assert sorted(state for job, state in drivers.items() if job != driver) == ["CANCELLED", "COMPLETED"]

    whole(folder)
    arrived, predicted = (
        {frame for event in named(folder, name) for frame in event["frame_ids"]}
        for name in ("ChunkArrived", "PredictionReady")
    )
    assert predicted == arrived == set(range(len(arrived)))
    keeps_what_it_has_learnt(folder)


def keeps_what_it_has_learnt(folder: RunFolder) -> None:
    """After each recovery ranks go on from the steps of its checkpoint, and their loss is nearer to that of before than
    to that of the first round."""
    rounds, checkpoints = named(folder, "CandidateReady"), named(folder, "CheckpointWritten")
    for recovery in named(folder, "RunRecovered"):
        *_, checkpoint = [each for each in checkpoints if each["number"] <= recovery["number"]]
        saved = max((each["steps"] for each in rounds if each["seq"] <= checkpoint["last"]), default=0)
        before = [each for each in rounds if each["seq"] < recovery["seq"]]
        after = rounds[len(before)]
        assert after["steps"] > saved > 0
        assert after["loss"] < (rounds[0]["loss"] + before[-1]["loss"]) / 2


def test_a_campaign_goes_on_after_its_node_has_died(tmp_path: Path, elsewhere: str) -> None:
    """All jobs are gone at once, with both ranks, which had one job, and a GPU each; others come with the node."""
    small = Job(memory="1500MiB", partition=elsewhere)
    both = replace(small, cores=2, ranks=2, gpus=2)
    site = replace(SITE, trainer=both, inference=small, beamline=replace(small, cores=2))
    assert [place.processes for place in places(site, 2)] == [2, 1, 1]
    folder = RunFolder.create(tmp_path / "run")
    with slurm(folder=folder.path, ranks=2, site=site) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        ranks = [address for address, worker in workers.items() if "trainer" in worker["resources"]]
        seen = client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["SLURM_JOB_ID"]), workers=ranks)
        assert sorted(gpu for gpu, _ in seen.values()) == ["0", "1"]
        assert len({job for _, job in seen.values()}) == 1
        driver = Thread(target=run, args=(long_experiment(), client, folder), daemon=True)
        driver.start()
        until(lambda: named(folder, "CheckpointWritten"))
        before, node = squeue("--format=%i").split(), squeue("--format=%N").split()[0]
        # All that runs there ends at once; the node itself, which is well, may be there again by itself.
        down = ["scontrol", "update", f"nodename={node}", "state=down", "reason=test"]
        subprocess.run(down, check=True)
        until(lambda: not set(before) & set(squeue("--format=%i").split()))
        subprocess.run([*down[:3], "state=resume"], check=False, capture_output=True)
        until(lambda: named(folder, "RunRecovered"))
        goes_on(folder)
        with attach(folder) as other:
            other.command("stop")
        driver.join()
    whole(folder)
    nothing_left()


def whole(folder: RunFolder) -> None:
    """The run has ended, and each frame that was measured has been predicted."""
    figures = folder.summary()
    assert figures["status"] == "finished"
    assert figures["frames_predicted"] == figures["frames_acquired"] > 0
    assert named(folder, "FramesLost") == []


def named(folder: RunFolder, name: str) -> list[dict]:
    return [event for event in folder.events() if event["event"] == name]


def retired(folder: RunFolder) -> list[int]:
    """Ranks that have handed over."""
    return [rank for change in named(folder, "GroupChanged") for rank in change["retired"]]


def goes_on(folder: RunFolder) -> None:
    """Frames are predicted and ranks train after the newest recovery."""

    def new() -> bool:
        names = [event["event"] for event in folder.events()]
        last = len(names) - names[::-1].index("RunRecovered")
        return {"PredictionReady", "CandidateReady"} <= set(names[last:])

    until(new)


def listening(jobs: set[str]) -> set[str]:
    """The addresses at which processes of these jobs take connections."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_JOB_ID") in jobs and "python" in process.name():
                there = process.net_connections(kind="inet")
                found |= {each.laddr.ip for each in there if each.status == psutil.CONN_LISTEN}
    return found


def command(*words: object) -> str:
    told = [sys.executable, "-m", "steering.cli", *map(str, words)]
    done = subprocess.run(told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def job_of(folder: RunFolder, kind: str) -> dict:
    return next(job for job in jobs_of(folder) if job["kind"] == kind)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def sbatch(*options: str) -> str:
    """The job's id."""
    done = subprocess.run(["sbatch", "--parsable", *options], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def squeue(*options: str) -> str:
    return subprocess.run(["squeue", "-h", *options], capture_output=True, text=True, check=True).stdout


def known_jobs() -> dict[str, dict[str, str]]:
    """What SLURM says of each job, also of those that have ended in the last five minutes."""
    done = subprocess.run(["scontrol", "show", "job", "--oneliner"], capture_output=True, text=True, check=True)
    found = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in done.stdout.splitlines()]
    return {facts["JobId"]: facts for facts in found if "JobId" in facts}


def nothing_left() -> None:
    """No job is in the queue, once none is about to end."""
    until(lambda: not squeue())


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (Job(partition="nothing"), "invalid partition specified: nothing"),
        (Job(directives=("--gres=crystal:1",)), "Invalid generic resource"),
        (Job(memory="9000GiB"), "Memory specification can not be satisfied"),
        (Job(walltime="soon"), "Invalid --time specification"),
    ],
)
def test_a_job_that_slurm_refuses_is_told_in_its_own_words(tmp_path: Path, job: Job, said: str) -> None:
    with (
        pytest.raises(RuntimeError, match=f"found a job that slurm refuses: .*{said}"),
        slurm(folder=tmp_path, ranks=1, site=replace(SITE, trainer=job)),
    ):
        pass
    nothing_left()


def test_jobs_that_wait_are_named_with_slurms_reason(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    later = replace(SITE, trainer=replace(SITE.trainer, directives=("--begin=now+1hour",)))
    with (
        pytest.raises(TimeoutError, match=r"no worker for trainer.* after 5 s.* job \d+: PENDING \(BeginTime\)"),
        slurm(folder=folder.path, ranks=1, site=replace(later, deadline_s=5.0), insecure=True),
    ):
        pass
    [waiting] = [line for line in status_lines(folder) if "trainer waits" in line]
    assert "PENDING (BeginTime)" in waiting
    nothing_left()


def test_jobs_that_end_before_their_worker_comes_are_given_up(tmp_path: Path) -> None:
    broken = replace(SITE, python="/nothing/python")
    with (
        pytest.raises(RuntimeError, match=r"found 3 jobs of \w+ in a row .*/nothing/python: No such file"),
        slurm(folder=tmp_path, ranks=1, site=broken),
    ):
        pass
    nothing_left()


def test_a_folder_that_the_nodes_do_not_see_is_told(queue: Path, elsewhere: str) -> None:
    """Jobs cannot even write their logs there."""
    if elsewhere != real.FAR:
        pytest.skip("this machine allows no node with a folder of its own")
    folder = RunFolder.create(queue / real.HIDDEN / "run")
    job = Job(memory="1500MiB", partition=elsewhere)
    with (
        pytest.raises(
            RuntimeError, match=r"found 3 jobs of .* in a row .*no log of it .* a file system that all nodes share"
        ),
        slurm(folder=folder.path, ranks=1, site=replace(SITE, trainer=job, inference=job, beamline=job)),
    ):
        pass
    nothing_left()
