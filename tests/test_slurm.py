"""A campaign in jobs of a real SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from steering.clusters import Job, Site, cluster, slurm
from steering.clusters.queue import places
from steering.models import ModelStore
from steering.runner import RunFolder, attach, start
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


def jobs_of(folder: RunFolder) -> list[dict]:
    return json.loads((folder.path / "jobs.json").read_text())["jobs"]


def command(*words: object) -> str:
    told = [sys.executable, "-m", "steering.cli", *map(str, words)]
    done = subprocess.run(told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_campaign_goes_on_when_jobs_are_cancelled_and_walltimes_near_their_end(tmp_path: Path) -> None:
    """By the site file of workflows/, with TLS: jobs are replaced, the predictor's before it ends; no frame is lost, no
    job is left, and the key stands in no file but its own."""
    folder = RunFolder.create(tmp_path / "run")
    with cluster(f"slurm:{SITE_FILE}", ranks=2, folder=folder.path) as client:
        assert client.scheduler.address.startswith("tls://127.0.0.1:")
        run = start(experiment(frames=20_000, rate=10.0, step=1.0), client, folder)  # it is stopped below
        until(lambda: run.snapshot().get("frames_predicted"))
        rank, predictor = job_of(folder, "trainer")["job"], job_of(folder, "inference")["job"]
        subprocess.run(["scancel", rank], check=True)
        subprocess.run(["scontrol", "update", f"JobId={predictor}", "EndTime=now+120"], check=True)
        assert "running for" in command("status", str(folder.path))
        with attach(folder) as other:
            assert other.snapshot()["status"] == "running"
        until(lambda: job_of(folder, "inference")["job"] != predictor and job_of(folder, "inference")["worker"])
        assert predictor in squeue("--jobs", predictor, "--states", "RUNNING")  # it still works beside its successor
        subprocess.run(["scancel", predictor], check=True)
        until(lambda: "PredictorReplaced" in {event["event"] for event in folder.events()})
        run.command("stop")
        figures = run.result()
        until(lambda: rank not in {job["job"] for job in jobs_of(folder)})
        assert sorted(job["kind"] for job in jobs_of(folder)) == ["beamline", "inference", "trainer", "trainer"]
    assert figures["ranks_lost"] >= 1
    assert figures["frames_predicted"] == figures["frames_acquired"] > 0
    nothing_left()
    secret = (folder.path / "credentials" / "key.pem").read_text().splitlines()[1]
    for file in folder.path.rglob("*"):
        if file.is_file() and file.parent.name != "credentials":
            assert secret.encode() not in file.read_bytes(), file


WORKFLOW = """
from dataclasses import replace
from steering import cluster, run
from tests.test_runner import experiment

def main(folder, arguments):
    long = experiment(frames=20_000, rate=10.0, step=1.0)  # it is stopped from outside
    with cluster(arguments[1], ranks=2, folder=folder.path) as client:
        run(replace(long, checkpoint_s=3.0), client, folder)
"""


def test_a_campaign_goes_across_three_walltimes(tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First all jobs of its roles end at once: ranks, predictor and runner are handed over before. Then the job of
    driver and scheduler is cancelled: the next one goes on from the checkpoint."""
    for name, value in {"PYTHONPATH": ROOT, "STEERING": STEERING, "SITE": SITE_FILE}.items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "work.py").write_text(WORKFLOW)
    script = str(ROOT / "workflows" / "schedules" / "driver.sbatch")
    options = ["--parsable", f"--chdir={tmp_path}", f"--output={tmp_path}/driver-%j.log"]
    driver = subprocess.run(["sbatch", *options, script, "work.py"], capture_output=True, text=True, check=True)
    job = driver.stdout.strip()
    path = tmp_path / "runs" / f"work-{job}"
    until((path / "summary.json").exists)
    folder = RunFolder(path)
    until(lambda: named(folder, "CheckpointWritten") and len(ModelStore(folder.models).versions()) > 1)

    jobs = {one["job"] for one in jobs_of(folder)}
    for one in jobs:
        subprocess.run(["scontrol", "update", f"JobId={one}", "EndTime=now+40"], check=True)
    until(lambda: len(named(folder, "RunRecovered")) == 1)
    until(lambda: not jobs & {one["job"] for one in jobs_of(folder)} and all(one["worker"] for one in jobs_of(folder)))
    goes_on(folder)

    subprocess.run(["scancel", job], check=True)
    until(lambda: len(named(folder, "RunRecovered")) == 2)
    goes_on(folder)
    command("stop", str(folder.path))
    until(lambda: folder.summary()["status"] != "running")
    figures = folder.summary()
    assert (figures["status"], figures["samples_lost"]) == ("finished", 0)
    assert figures["frames_predicted"] == figures["frames_acquired"] > 0
    assert named(folder, "FramesLost") == []
    steps = [version.steps for version in ModelStore(folder.models).versions()]
    assert steps == sorted(steps)
    nothing_left()


def named(folder: RunFolder, name: str) -> list[dict]:
    return [event for event in folder.events() if event["event"] == name]


def goes_on(folder: RunFolder) -> None:
    """Frames are predicted and ranks train after the newest recovery."""

    def new() -> bool:
        names = [event["event"] for event in folder.events()]
        last = len(names) - names[::-1].index("RunRecovered")
        return {"PredictionReady", "CandidateReady"} <= set(names[last:])

    until(new)


def job_of(folder: RunFolder, kind: str) -> dict:
    return next(job for job in jobs_of(folder) if job["kind"] == kind)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def squeue(*options: str) -> str:
    return subprocess.run(["squeue", "-h", *options], capture_output=True, text=True, check=True).stdout


def nothing_left() -> None:
    """No job is in the queue, once none is about to end."""
    until(lambda: not squeue())


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (Job(partition="nothing"), "invalid partition specified: nothing"),
        (Job(directives=("--gres=crystal:1",)), "Invalid generic resource"),
        (Job(memory="9000GiB"), "Memory specification can not be satisfied"),
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
        pytest.raises(TimeoutError, match=r"no worker for trainer.* after 8 s.* job \d+: PENDING \(BeginTime\)"),
        slurm(folder=folder.path, ranks=1, site=later, timeout=8, insecure=True),
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


def test_the_ranks_of_a_job_see_one_gpu_each(tmp_path: Path) -> None:
    """Two ranks in one job with the node's two GPUs; the site's GPUs are none, but SLURM hands them out."""
    site = replace(SITE, trainer=Job(cores=2, ranks=2, gpus=2, memory="1500MiB"))
    assert [place.processes for place in places(site, 2)] == [2, 1, 1]
    with slurm(folder=tmp_path, ranks=2, site=site) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        ranks = [address for address, worker in workers.items() if "trainer" in worker["resources"]]
        seen = client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["SLURM_JOB_ID"]), workers=ranks)
        assert sorted(gpu for gpu, _ in seen.values()) == ["0", "1"]
        assert len({job for _, job in seen.values()}) == 1
