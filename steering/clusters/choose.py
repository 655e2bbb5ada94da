"""One argument for every kind of cluster, as each workflow's `--cluster` takes it."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path

from distributed import Client

from steering.clusters.existing import existing
from steering.clusters.job_options import SYSTEMS
from steering.clusters.local import local
from steering.clusters.queue import job_queue


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Add --cluster and --insecure to a workflow's arguments; `cluster` takes what they say."""
    systems = "|".join(SYSTEMS)
    parser.add_argument(
        "--cluster",
        default="local",
        metavar="WHERE",
        help=f"local; {systems}[:SITE.toml], a job queue; or an address or scheduler file of one that runs (local)",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="without TLS, on a network where you trust every user of it"
    )


def cluster(
    where: str = "local", *, ranks: int = 2, folder: str | Path | None = None, insecure: bool = False
) -> AbstractContextManager[Client]:
    """The cluster that `where` names, a context manager that yields its client.

    where: "local"; "slurm", "pbs" or "htcondor", after a colon the path of a site file; else the address of a running
    scheduler or the path of its scheduler file. ranks: trainer ranks. folder: the run's, where job scripts' logs, the
    state of the jobs and credentials go; a job queue needs it. insecure: without TLS beyond this machine.
    """
    if where == "local":
        return local(ranks=ranks)
    system, _, site = where.partition(":")
    if system in SYSTEMS:
        if folder is None:
            raise ValueError(f"found --cluster {where} without a folder, expected the run's: cluster(..., folder=...)")
        return job_queue(system, folder=folder, ranks=ranks, site=site or None, insecure=insecure)
    return existing(where, ranks=ranks, insecure=insecure)
