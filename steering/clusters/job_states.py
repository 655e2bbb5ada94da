"""What a batch system says of jobs: their state, its reason, and when they end. A function for each system, which also
knows its words for jobs that are over."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

_SLURM_OVER = (
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
_PBS = {"Q": "QUEUED", "R": "RUNNING", "H": "HELD", "W": "WAITING", "S": "SUSPENDED"}
_PBS_OVER = ("C", "E", "F", "X")  # completed, exiting, finished, expired
_HTCONDOR = {"1": "IDLE", "2": "RUNNING", "5": "HELD", "7": "SUSPENDED"}
_HTCONDOR_OVER = ("3", "4", "6")  # removed, completed, handing its files back


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job in the queue."""

    job: str
    state: str
    """In the system's own words, such as PENDING."""
    reason: str = ""
    """Why it waits, in the system's own words."""
    ends: float | None = None
    """Unix time at which its walltime is over, where it runs and the system is asked for that."""


States = dict[str, JobState] | None
"""By their ids the jobs that a system still has; None where it does not answer, which says nothing of the jobs."""


def slurm_states(jobs: Sequence[str]) -> States:
    """The state of each job that SLURM still has."""
    # %A, not %i: of a task of an array that is 8_1, where SLURM_JOB_ID is a number of its own.
    done = _asked(["squeue", "--noheader", "--jobs", ",".join(jobs), "--format", "%A|%T|%e|%r"])
    if done is None or (done.returncode and "Invalid job id" not in done.stderr):
        return None
    return parsed_squeue(done.stdout)


def pbs_states(jobs: Sequence[str]) -> States:
    """The state of each job that PBS still has."""
    done = _asked(["qstat", *jobs])
    return None if done is None else parsed_qstat(jobs, done.stdout, done.stderr)


def htcondor_states(jobs: Sequence[str]) -> States:
    """The state of each job that HTCondor still has."""
    done = _asked(["condor_q", *jobs, "-autoformat:j", "JobStatus", "HoldReason"])
    return None if done is None or done.returncode else parsed_condor_q(done.stdout)


def _asked(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None


def parsed_squeue(lines: str) -> dict[str, JobState]:
    """The lines of squeue in the format %A|%T|%e|%r, by job id; jobs that are over are left out."""
    found = {}
    for line in lines.splitlines():
        job, state, end, reason = line.strip().split("|", 3)
        if state in _SLURM_OVER:
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


def parsed_qstat(jobs: Sequence[str], lines: str, errors: str) -> States:
    """The table of qstat, by the numbers of jobs; those that are over are left out. None where it says of a job neither
    its state nor, among the errors, that it is unknown or has finished."""
    rows = [line.split() for line in lines.splitlines() if re.match(r"\d", line)]
    letters = {re.split(r"\D", row[0])[0]: row[-2] for row in rows if len(row) > 2}
    gone = re.findall(r"Unknown Job Id\D*(\d+)|(\d+)\S* Job has finished", errors)
    letters |= {job: "F" for pair in gone for job in pair if job}
    if not set(jobs) <= set(letters):
        return None
    return {
        job: JobState(job=job, state=_PBS.get(letters[job], letters[job]))
        for job in jobs
        if letters[job] not in _PBS_OVER
    }


def parsed_condor_q(lines: str) -> dict[str, JobState]:
    """The lines of condor_q -autoformat:j JobStatus HoldReason, by job id; jobs that are over are left out."""
    found = {}
    for line in filter(str.strip, lines.splitlines()):
        job, status, reason = line.split(maxsplit=2)
        if status not in _HTCONDOR_OVER:
            reason = "" if reason == "undefined" else reason
            found[job] = JobState(job=job, state=_HTCONDOR.get(status, status), reason=reason)
    return found


def last_words(log: str, lines: int = 3) -> str:
    """The end of what a job wrote."""
    return " / ".join(line.strip() for line in log.splitlines()[-lines:] if line.strip())
