"""The night as a Prefect flow, for sites that run Prefect: it starts the command of the crontab.

Prefect needs an environment of its own, for its libraries and those of steering exclude each other:

    python -m venv prefect && prefect/bin/pip install -r workflows/schedules/prefect.txt
    prefect/bin/python workflows/schedules/prefect_nightly.py     # in the checkout; serves the flow, every night

75, "try later", is tried again every ten minutes, for two hours.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from prefect import flow, task
from prefect.logging import get_run_logger

TRY_LATER = 75
COMMAND = (".venv/bin/steering", "run", "--quiet", "workflows/nightly.py", "runs")


class TryLater(RuntimeError):
    """Another nightly run is at work, or a run has ended meanwhile."""


def _later(_task: object, _run: object, state: object) -> bool:
    """Whether a night that failed is tried again."""
    try:
        state.result()  # type: ignore[attr-defined]
    except TryLater:
        return True
    except Exception:
        return False
    return False


@task(retries=12, retry_delay_seconds=600, retry_condition_fn=_later)
def night(command: Sequence[str]) -> None:
    """One start. Raises TryLater for 75, RuntimeError with the command's own words where it failed."""
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    said = done.stderr.strip()
    if done.returncode == TRY_LATER:
        raise TryLater(said)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {said}")
    if said:
        get_run_logger().warning(said)


@flow(name="steering-nightly")
def nightly(command: Sequence[str] = COMMAND) -> None:
    """Learn from what the day left."""
    night(command)


if __name__ == "__main__":
    nightly.serve(name="steering-nightly", cron="30 2 * * *")
