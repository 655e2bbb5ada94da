"""A cluster on this machine: one process per trainer rank, one for inference, one for the rest."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import resource_tracker
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.utils import get_mp_context

from steering.clusters.allocator import keep_memory
from steering.clusters.gpus import shared_out, visible
from steering.clusters.imports import every
from steering.clusters.logs import share_logs
from steering.clusters.roles import INFERENCE, LABEL, RUNNER, SOURCE, TRAINER
from steering.clusters.script import refuse_unguarded

CONFIG = {
    # Workers are forked from a server that has imported the heavy libraries once. On two cores four workers with torch
    # are up in half the time, share 140 MB each, and a lost one is back in 0.2 s.
    "distributed.worker.multiprocessing-method": "forkserver",
    "distributed.worker.profile.enabled": False,
}
SILENT = logging.CRITICAL + 1
"""A cluster that closes calls a message that comes too late critical."""
PAGE = "steering.view.live.dashboard"
"""What puts the live page of the run at /steering of the scheduler's own web server, where Bokeh is installed."""
PRELOAD = ["distributed", *every()]


@contextmanager
def local(ranks: int = 2, *, apart: bool = False, gpus: Sequence[int | str] | None = None) -> Iterator[Client]:
    """Start a cluster of `ranks` trainer ranks on this machine; everything is gone when the block is left.

    Workers, one process each, by their Dask resources: `ranks` of {"trainer": 1}, one of {"inference": 1}, one of
    {"source": 1, "label": 1, "runner": 1} with 4 threads; `apart`: one for each of these three, so that each may be
    lost alone, for two more processes of 140 MB. Linear algebra in them uses one thread, unless
    OMP_NUM_THREADS says otherwise. gpus: numbers or UUIDs of the GPUs to use, by default all that are visible; each
    process gets one, by CUDA_VISIBLE_DEVICES: ranks take them in turn, and the predictor with label making has one of
    its own where there are more GPUs than ranks, else it shares the last of those with the fewest ranks. [] for none.
    Ctrl-C reaches the driver only, so that it may close the run in order; when the
    driver dies, so do the workers. A script starts it below `if __name__ == "__main__":`. Raises RuntimeError where it
    does not, ValueError.
    """
    if ranks < 1:
        raise ValueError(f"found ranks={ranks}, expected 1 or more")
    refuse_unguarded()
    resource_tracker.ensure_running()  # its own start would unblock the signal again in the thread that needs it first
    # Threads and processes inherit the signals blocked where they are started: the cluster's loop, and through it every
    # worker from its first moment on, never sees the terminal's Ctrl-C. One that comes while the cluster starts waits
    # until there is a cluster to close.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with (
            quiet(),
            tempfile.TemporaryDirectory(prefix="steering-", ignore_cleanup_errors=True) as scratch,
            dask.config.set({**CONFIG, "temporary-directory": scratch}),
            _cluster(ranks, apart, gpus) as cluster,
            Client(cluster) as client,
        ):
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            keep_memory(client)
            share_logs(client)
            yield client
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold Dask's own log back.

    What goes wrong reaches the driver as an exception; Dask's own account of it, of a cluster that closes too, does
    not belong on a terminal. Held around the cluster, whose own silence ends before its last words."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(SILENT)
    try:
        yield
    finally:
        logger.setLevel(before)


def _cluster(ranks: int, apart: bool, gpus: Sequence[int | str] | None) -> SpecCluster:
    get_mp_context().set_forkserver_preload(PRELOAD)
    scheduler = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    if find_spec("bokeh") is not None:
        scheduler["preload"] = [PAGE]
    workers = worker_specs(ranks, apart)
    if gpus is not None or visible():
        workers = on_gpus(workers, visible() if gpus is None else [str(gpu) for gpu in gpus])
    return SpecCluster(scheduler={"cls": Scheduler, "options": scheduler}, workers=workers, silence_logs=SILENT)


def on_gpus(workers: dict[str, dict[str, Any]], gpus: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The same workers, each with the GPU that it may see, see `shared_out`; without any where there is none."""
    trainers = [name for name, worker in workers.items() if TRAINER in worker["options"]["resources"]]
    of_ranks, of_predictor = shared_out(gpus, len(trainers))
    for name, worker in workers.items():
        gpu = of_ranks[trainers.index(name)] if name in trainers else of_predictor
        worker["options"]["env"] = {**worker["options"]["env"], "CUDA_VISIBLE_DEVICES": gpu}
    return workers


def worker_specs(ranks: int, apart: bool = False) -> dict[str, dict[str, Any]]:
    """Of each worker by its name, what SpecCluster starts; apart: each role in a process of its own."""
    roles: dict[str, tuple[dict[str, float], int]] = {f"trainer-{k}": ({TRAINER: 1}, 1) for k in range(ranks)}
    roles["inference"] = ({INFERENCE: 1}, 1)
    if apart:
        roles |= {role: ({role: 1}, 2) for role in (SOURCE, LABEL, RUNNER)}
    else:
        roles["beamline"] = ({SOURCE: 1, LABEL: 1, RUNNER: 1}, 4)
    shared = {
        "host": "127.0.0.1",
        "memory_limit": 0,
        "dashboard": False,
        "silence_logs": SILENT,
        "config": CONFIG,
        "env": dict(os.environ),  # a fork server keeps the environment of its own start
    }
    return {
        name: {"cls": Nanny, "options": {**shared, "resources": resources, "nthreads": threads}}
        for name, (resources, threads) in roles.items()
    }
