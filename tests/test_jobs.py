"""Jobs are watched and followed by others: the bookkeeping, on a batch system that does what the test says."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from steering.clusters import jobs as watched
from steering.clusters.job_options import SYSTEMS
from steering.clusters.job_states import JobState
from steering.clusters.jobs import Jobs
from steering.clusters.succession import Place


class Submitted:
    job_id: str | None = None


class Queue:
    """A SpecCluster and the batch system behind it: jobs are numbered, and run until they are taken away."""

    def __init__(self):
        self.worker_spec, self.workers = {}, {}
        self.states = {}
        self._created = set()
        self.refuses = False
        self.number = 0
        self.laid_down = []

    def sync(self, function, **named):
        return function(**named)

    @property
    def scheduler(self):
        return self

    def _correct_state(self):
        for name in set(self.workers) - set(self.worker_spec):
            self.states.pop(self.workers.pop(name).job_id, None)
        for name in set(self.worker_spec) - set(self.workers):
            self.workers[name] = Submitted()
            if self.refuses:
                raise RuntimeError("Exit code: 1\nstderr:\nsbatch: error: the queue is full\n")
            self.number += 1
            self.workers[name].job_id = str(self.number)
            self.run(str(self.number))

    def run(self, job, ends=None):
        self.states[job] = JobState(job=job, state="RUNNING", ends=ends)

    def identity(self, n_workers):
        """As the scheduler says it: the workers of all jobs in the queue."""
        there = [name for name, worker in self.workers.items() if worker.job_id in self.states]
        return {
            "workers": {f"tls://{name}": {"name": name, "resources": {}} for name in there if name not in self.silent}
        }

    def set_metadata(self, keys, value):
        """What runs hear of roles whose jobs are on their way."""
        self.awaited = value

    def run_on_scheduler(self, function, names):
        self.laid_down.append(sorted(names))

    silent = ()
    """Workers that never come."""


def answers(monkeypatch, states):
    monkeypatch.setitem(SYSTEMS, "slurm", replace(SYSTEMS["slurm"], states=states))


@pytest.fixture
def queue():
    return Queue()


@pytest.fixture
def jobs(queue, tmp_path, monkeypatch):
    answers(monkeypatch, lambda asked: {j: s for j, s in queue.states.items() if j in asked})
    monkeypatch.setattr(watched, "LOOK_S", 1e6)  # the test looks
    made = Jobs(queue, queue, tmp_path, system="slurm", handover=300.0)
    with made.kept([Place(kind="trainer", number=0), Place(kind="inference", number=0)], lambda place: {}):
        yield made


def told(tmp_path):
    return {job["kind"]: job for job in json.loads((tmp_path / "jobs.json").read_text())["jobs"]}


def test_a_job_that_is_gone_is_followed_by_another(queue, jobs, tmp_path):
    jobs.look()
    assert told(tmp_path)["trainer"]["worker"]
    lost = told(tmp_path)["trainer"]["job"]
    del queue.states[lost]
    jobs.look()
    jobs.look()
    assert told(tmp_path)["trainer"]["job"] not in (lost, told(tmp_path)["inference"]["job"])
    assert sorted(queue.worker_spec) == ["inference-0", "trainer-0.1"]
    assert len(queue.states) == 2


def test_a_worker_that_starts_again_does_not_cost_its_job(queue, jobs, tmp_path):
    """Its nanny needs some seconds; meanwhile the job goes on."""
    jobs.look()
    job = told(tmp_path)["trainer"]["job"]
    queue.silent = ("trainer-0",)
    jobs.look()
    assert told(tmp_path)["trainer"]["job"] == job
    assert len(queue.states) == 2


def test_a_successor_comes_beside_a_job_that_nears_its_end(queue, jobs, tmp_path):
    old = told(tmp_path)["inference"]["job"]
    queue.run(old, ends=time.time() + 3600)
    jobs.look()
    assert told(tmp_path)["inference"]["job"] == old
    queue.run(old, ends=time.time() + 100)
    for _ in range(3):
        jobs.look()  # only one, however often one looks
    assert told(tmp_path)["inference"]["job"] != old
    assert old in queue.states
    assert len(queue.states) == 3
    del queue.states[old]
    jobs.look()
    assert sorted(queue.worker_spec) == ["inference-0.1", "trainer-0"]


def nearing(queue, jobs, tmp_path, seconds):
    """The rank's job ends in so many seconds, and its successor is due."""
    old = told(tmp_path)["trainer"]["job"]
    queue.run(old, ends=time.time() + 3600)
    jobs.look()
    queue.run(old, ends=time.time() + seconds)
    jobs.look()


def test_roles_are_laid_down_once_and_only_when_the_successor_is_there(queue, jobs, tmp_path):
    queue.silent = ("trainer-0.1",)
    nearing(queue, jobs, tmp_path, 100)
    jobs.look()
    assert queue.laid_down == []
    assert queue.awaited == ["trainer"]
    queue.silent = ()
    jobs.look()
    jobs.look()
    assert queue.laid_down == [["trainer-0"]]
    assert queue.awaited == []


def test_a_role_is_laid_down_near_the_end_though_the_successor_waits(queue, jobs, tmp_path):
    queue.silent = ("trainer-0.1",)
    nearing(queue, jobs, tmp_path, 15)
    jobs.look()
    assert queue.laid_down == [["trainer-0"]]


def test_where_no_successor_can_be_submitted_the_job_goes_on(queue, jobs, tmp_path):
    jobs.look()
    queue.refuses = True
    nearing(queue, jobs, tmp_path, 100)
    jobs.look()
    assert queue.laid_down == []


def test_a_refusal_in_the_middle_of_a_run_is_tried_again(queue, jobs, tmp_path, caplog):
    jobs.look()
    lost = told(tmp_path)["trainer"]["job"]
    del queue.states[lost]
    queue.refuses = True
    jobs.look()
    assert "found a job that slurm refuses: sbatch: error: the queue is full; it is tried again in 30 s" in caplog.text
    queue.refuses = False
    jobs.look()
    assert told(tmp_path)["trainer"]["job"] == lost
    jobs.look(time.time() + 31.0)
    assert told(tmp_path)["trainer"]["job"] != lost
    assert len(queue.states) == 2


def test_a_batch_system_that_does_not_answer_says_nothing_of_the_jobs(queue, jobs, tmp_path, monkeypatch):
    answers(monkeypatch, lambda asked: None)
    before = dict(queue.states)
    jobs.look()
    assert queue.states == before


def test_a_place_whose_workers_never_come_is_given_up_and_said(queue, jobs, tmp_path):
    queue.silent = ("trainer-0", "trainer-0.1", "trainer-0.2")
    for number in range(4):
        queue.states.pop(told(tmp_path)["trainer"]["job"], None)
        (tmp_path / "jobs").mkdir(exist_ok=True)
        (tmp_path / "jobs" / f"steering-trainer-{queue.number}.err").write_text(f"no such python {number}\n")
        jobs.look()
    assert queue.number == 4  # two at first, and two more trainers
    [said] = json.loads((tmp_path / "jobs.json").read_text())["given_up"]
    assert "found 3 jobs of trainer in a row" in said
    assert "no such python" in said
    with pytest.raises(RuntimeError, match="found 3 jobs of trainer"):
        jobs.wait(1, timeout=None)
