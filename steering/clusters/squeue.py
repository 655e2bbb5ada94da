"""What a batch system says of jobs: their state, its reason, and when they end."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

_OVER = (
    *(
        "COMPLETED",
        "CANCELLED",
        "FAILED",
        "TIMEOUT",
        "NODE_FAIL",
        "PREEMPTED",
        "OUT_OF_MEMORY",
        "BOOT_FAIL",
        "DEADLINE",
    ),
    "COMPLETING",  # what it started is being ended; where its node hangs that may take minutes
)


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job in the queue."""

    job: str
    state: str
    """In the system's own words, such as PENDING."""
    reason: str = ""
    """Why it waits, in the system's own words."""
    ends: float | None = None
    """Unix time at which its walltime is over, where it runs."""


def slurm_states(jobs: Sequence[str]) -> dict[str, JobState] | None:
    """The state of each job that SLURM still has; None where SLURM does not answer, which says nothing of the jobs."""
    if not jobs:
        return {}
    command = ["squeue", "--noheader", "--jobs", ",".join(jobs), "--format", "%i|%T|%e|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return parsed(done.stdout)


def parsed(lines: str) -> dict[str, JobState]:
    """The lines of squeue in the format %i|%T|%e|%r, by job id; jobs that are over are left out."""
    found = {}
    for line in lines.splitlines():
        job, state, end, reason = line.strip().split("|", 3)
        if state in _OVER:
            continue
        running = state == "RUNNING"
        found[job] = JobState(
            job=job, state=state, reason="" if reason == "None" else reason, ends=_time(end) if running else None
        )
    return found


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # N/A, UNLIMITED
        return None


def last_words(log: str, lines: int = 3) -> str:
    """The end of what a job wrote."""
    return " / ".join(line.strip() for line in log.splitlines()[-lines:] if line.strip())
