"""Options of dask-jobqueue for each kind of job, and what differs between batch systems: a function each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.security import Security

from steering.clusters.job_states import States, htcondor_states, pbs_states, slurm_states
from steering.clusters.roles import TRAINER
from steering.clusters.site import CARRIES, Job, Site

Options = dict[str, Any]


def slurm_options(job: Job) -> Options:
    """SLURM: sbatch. It holds a job that it starts again by itself for two minutes: another takes the place instead."""
    gpus = [f"--gres=gpu:{job.gpus}"] if job.gpus else []
    return {
        "queue": job.partition,
        "account": job.account,
        "walltime": job.walltime,
        "job_extra_directives": ["--no-requeue", *gpus, *job.directives],
    }


def pbs_options(job: Job) -> Options:
    """PBS: qsub."""
    gpus = f":ngpus={job.gpus}" if job.gpus else ""
    memory = job.memory.replace("iB", "B").lower()  # PBS means the binary units
    return {
        "queue": job.partition,
        "account": job.account,
        "walltime": job.walltime,
        "resource_spec": f"select=1:ncpus={job.cores}{gpus}:mem={memory}",
        "job_extra_directives": list(job.directives),
    }


def htcondor_options(job: Job) -> Options:
    """HTCondor: condor_submit. It knows neither partitions nor a walltime; directives are `name = value`."""
    lines = dict(line.replace(" ", "").split("=", 1) for line in job.directives)
    gpus = {"request_gpus": str(job.gpus)} if job.gpus else {}
    account = {"accounting_group": job.account} if job.account else {}
    return {"disk": job.disk, "job_extra_directives": {**gpus, **account, **lines}}


@dataclass(frozen=True)
class System:
    """A batch system: another one that dask-jobqueue knows is one more entry in SYSTEMS, with its own options."""

    job: str
    """Its class of dask-jobqueue, as module:class."""
    commands: tuple[str, ...]
    """By which jobs are submitted, cancelled and looked at."""
    options: Callable[[Job], Options]
    """Options of that class for a job, beside those that all classes take."""
    states: Callable[[Sequence[str]], States]
    """How those of these jobs stand that are not over."""


SYSTEMS = {
    "slurm": System("dask_jobqueue.slurm:SLURMJob", ("sbatch", "scancel", "squeue"), slurm_options, slurm_states),
    "pbs": System("dask_jobqueue.pbs:PBSJob", ("qsub", "qdel", "qstat"), pbs_options, pbs_states),
    "htcondor": System(
        "dask_jobqueue.htcondor:HTCondorJob",
        ("condor_submit", "condor_rm", "condor_q"),
        htcondor_options,
        htcondor_states,
    ),
}
"""Batch systems by name."""


OWN_HOST = (
    "--host $({python} -c 'import socket; u = socket.socket(type=socket.SOCK_DGRAM); "
    """u.connect(("{scheduler}", 9)); print(u.getsockname()[0])')"""
)
"""Finds, on the node, the address by which it reaches the scheduler; nothing is sent."""


def job_options(
    system: str, kind: str, site: Site, folder: Path, security: Security | None, scheduler: str = "SCHEDULER"
) -> Options:
    """All options of a dask-jobqueue Job of one kind (`trainer`, `inference`, `beamline`).

    folder: of the run; job logs go to `jobs` in it. scheduler: its host. A worker listens on the site's interface, or
    where the site names none, on the address by which its node reaches the scheduler; never on all.
    """
    job = site.jobs[kind]
    threads = 4 if len(CARRIES[kind]) > 1 else 1  # source, label making and runner must not wait for one another
    worker = [
        f"--resources {','.join(f'{role}=1' for role in CARRIES[kind])}",
        f"--nthreads {threads}",
        "--memory-limit 0",  # the batch system watches over it; a paused worker would stop the group
        "--no-dashboard --dashboard-address 127.0.0.1:0",  # the server of its health, which else listens on all
    ]
    if site.interface is None:
        worker.append(OWN_HOST.format(python=site.python, scheduler=scheduler))
    if job.gpus:
        worker.append("--preload steering.clusters.gpus")
    worker.append("--preload steering.clusters.imports")
    options = {
        "cores": job.cores,
        "memory": job.memory,
        "processes": job.ranks if kind == TRAINER else 1,
        "job_name": f"steering-{kind}",
        "python": site.python,
        "interface": site.interface,
        "protocol": "tcp://" if security is None else "tls://",
        "security": security,
        "local_directory": site.scratch or str(folder / "jobs" / "scratch"),
        "log_directory": str(folder / "jobs"),
        "death_timeout": site.start_s,
        "worker_extra_args": worker,
        "job_script_prologue": _prologue(site, job),
        "job_directives_skip": list(site.refused),
    }
    return {**options, **SYSTEMS[system].options(job)}


def _prologue(site: Site, job: Job) -> list[str]:
    modules = [f"module load {name}" for name in site.modules]
    threads = f"export OMP_NUM_THREADS={max(job.cores // job.ranks, 1)}"
    return [*modules, threads, *site.prologue]
