"""The job that the driver itself is in: another one may wait to go on with its run when it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from steering.clusters.job_states import slurm_states
from steering.clusters.succession import lead

SUCCESSOR = "STEERING_SUCCESSOR"
"""Environment variable: the id of the job that goes on with the run, submitted beforehand, see
workflows/schedules/driver.sbatch."""
LEAD_S = 60.0
"""So long before its end, or half of its time, the driver ends by itself: a batch system's own signal comes too early,
too late, or not at all."""
_LOOK_S = 2.0


class JobEnds(KeyboardInterrupt):
    """The driver's job ends: what it watches over is left to the job that goes on with it."""


def successor() -> str | None:
    """Id of the job that goes on with this run; None where there is none."""
    return os.environ.get(SUCCESSOR) or None


@contextlib.contextmanager
def watched_end() -> Iterator[None]:
    """Send this process SIGTERM before the end of its SLURM job, where another one waits to go on with its run."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or successor() is None:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(job, over), name="steering-own-job", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(job: str, over: threading.Event) -> None:
    early: float | None = None
    while not over.wait(_LOOK_S):
        state, now = (slurm_states([job]) or {}).get(job), time.time()
        early = lead(state, now, LEAD_S) if early is None else early
        if early is not None and state is not None and state.ends is not None and now >= state.ends - early:
            os.kill(os.getpid(), signal.SIGTERM)
            return
