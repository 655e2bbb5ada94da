"""A cluster of batch jobs, through dask-jobqueue: a job script for each role, and another job wherever one ends."""

from __future__ import annotations

import importlib
import logging
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
from distributed import Client
from distributed.utils import get_ip

from steering.clusters import credentials
from steering.clusters.allocator import keep_memory
from steering.clusters.job_options import SYSTEMS, job_options
from steering.clusters.jobs import Jobs
from steering.clusters.local import SILENT, quiet
from steering.clusters.logs import share_logs
from steering.clusters.roles import INFERENCE, TRAINER
from steering.clusters.site import BEAMLINE, Site, read_site
from steering.clusters.succession import Place

if TYPE_CHECKING:
    from distributed.security import Security

logger = logging.getLogger(__name__)


def slurm(
    *,
    folder: str | Path,
    ranks: int = 2,
    site: Site | str | Path | None = None,
    at_least: int | None = None,
    timeout: float | None = None,
    insecure: bool = False,
) -> Any:
    """SLURM jobs for every role, a context manager that yields a client; see `job_queue`."""
    return job_queue(
        "slurm", folder=folder, ranks=ranks, site=site, at_least=at_least, timeout=timeout, insecure=insecure
    )


@contextmanager
def job_queue(
    system: str,
    *,
    folder: str | Path,
    ranks: int = 2,
    site: Site | str | Path | None = None,
    at_least: int | None = None,
    timeout: float | None = None,
    insecure: bool = False,
) -> Iterator[Client]:
    """Submit a job for each role, wait for them, and yield a client; the jobs are cancelled when the block is left.

    The scheduler is in this process: submit the driver itself as a job where login nodes allow no long processes.
    system: "slurm", "pbs" or "htcondor". folder: the run's, on a file system that the nodes share: the jobs' state
    (jobs.json), their logs (jobs) and the credentials (credentials, mode 0600) go there. ranks: trainer ranks. site:
    what the site needs, or the path of its TOML file. at_least: ranks to begin with, all by default; the others join
    when their jobs start. timeout: seconds to wait for the roles; None: as the site says. insecure: without
    TLS, on a network that you trust.

    A job that ends is replaced, under SLURM one whose walltime nears its end already before. Raises ImportError
    without dask-jobqueue, RuntimeError where the batch system refuses a job (in its own words) or jobs end before their
    workers come, TimeoutError.
    """
    if system not in SYSTEMS:
        raise ValueError(f"found the batch system {system!r}, expected one of {', '.join(SYSTEMS)}")
    if ranks < 1:
        raise ValueError(f"found ranks={ranks}, expected 1 or more")
    described = site if isinstance(site, Site) else read_site(site)
    _check_machine(system, described)
    folder = Path(folder).absolute()
    security = None if insecure else credentials.make(folder)
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    with (
        quiet(),
        dask.config.set({"distributed.worker.profile.enabled": False}),
        _scheduler(system, described, folder, security) as cluster,
        Client(cluster) as client,
    ):
        jobs = Jobs(cluster, client, folder, system=system, handover=described.handover_s)
        with jobs.kept(places(described, ranks), lambda place: _spec(system, place, described, folder, security)):
            keep_memory(client)
            share_logs(client)
            jobs.wait(at_least or ranks, described.deadline_s if timeout is None else timeout)
            yield client


def _check_machine(system: str, site: Site) -> None:
    """Raise ValueError for an interface that is not there, RuntimeError where the system's commands are missing."""
    there = [name for _, name in socket.if_nameindex()]
    if site.interface is None and system == "htcondor":
        raise ValueError(
            'found no interface in the site file, expected one for HTCondor, such as interface = "eth0": workers would '
            f"listen on all; this machine has {', '.join(there)}"
        )
    if site.interface is not None and site.interface not in there:
        raise ValueError(
            f"found the interface {site.interface!r} in the site file, expected one that driver and nodes have; this "
            f"machine has {', '.join(there)}"
        )
    for command in SYSTEMS[system].commands:
        if shutil.which(command) is None:
            raise RuntimeError(f"found no command {command}, expected a machine from which {system} takes jobs")


def places(site: Site, ranks: int) -> list[Place]:
    """The jobs of a run: trainer jobs for so many ranks, one for inference, one for the rest."""
    each = site.trainer.ranks
    trainers = [
        Place(kind=TRAINER, number=number, processes=min(each, ranks - number * each))
        for number in range(-(-ranks // each))
    ]
    return [*trainers, Place(kind=INFERENCE, number=0), Place(kind=BEAMLINE, number=0)]


def _spec(system: str, place: Place, site: Site, folder: Path, security: Security | None) -> dict[str, Any]:
    """The entry of SpecCluster.worker_spec for a place."""
    host = "" if site.interface else get_ip()
    options = {**job_options(system, place.kind, site, folder, security, host), "processes": place.processes}
    group = [f"-{number}" for number in range(place.processes)] if place.processes > 1 else None
    return {"cls": job_class(system), "options": options, **({"group": group} if group else {})}


def job_class(system: str) -> Any:
    """The class of dask-jobqueue for a batch system. Raises ImportError where it is not installed."""
    # Its import replaces the handler of Ctrl-C by one that exits: the run would not be closed in order.
    before = signal.getsignal(signal.SIGINT)
    module, name = SYSTEMS[system].job.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(
            "found no dask-jobqueue, expected it for a job queue: pip install 'steering[jobqueue]'"
        ) from error
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


def job_script(system: str, kind: str, site: Site, folder: Path, security: Security | None = None) -> str:
    """The script that is submitted for one kind of job, to look at: `trainer`, `inference` or `beamline`."""
    options = job_options(system, kind, site, folder, security)
    script: str = job_class(system)("SCHEDULER", name=kind, **options).job_script()
    return script


def _scheduler(system: str, site: Site, folder: Path, security: Security | None) -> Any:
    """A scheduler in this process that listens on the chosen interface alone, without a job yet."""
    kind = job_class(system)
    from dask_jobqueue.core import JobQueueCluster  # noqa: PLC0415

    where = {"interface": site.interface} if site.interface else {"host": get_ip()}
    options = job_options(system, TRAINER, site, folder, security)
    for key in ("interface", "protocol", "security"):
        options.pop(key)
    return JobQueueCluster(
        job_cls=kind,
        interface=site.interface,
        security=security,
        protocol="tcp://" if security is None else "tls://",
        scheduler_options={**where, "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"},
        silence_logs=SILENT,
        **options,
    )
