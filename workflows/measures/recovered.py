"""Demos that are killed with all their processes and recovered, beside demos that nobody disturbs."""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steering import RunFolder

DEMO = Path(__file__).parents[1] / "simulated_drift.py"
_LONGEST_S = 1800.0


def recovered(
    folder: Path, arguments: list[str], runs: int, seed: int = 0, before: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """So many demos undisturbed, and as many killed at a random moment after their first checkpoint and recovered:
    the figures after each pair. before: figures of earlier pairs, which are gone on from.

    The error of a run: the median over its samples of the phase error of the final version. Raises RuntimeError for a
    run that does not end well.
    """
    names = ("uninterrupted", "recovered", "killed_after_share", "seconds")
    whole, cut, shares, took = (list((before or {}).get(name, ())) for name in names)
    for number in range(len(whole), runs):
        path, begun = folder / f"whole-{number}", time.monotonic()
        _ended(_started("run", "--out", str(path), str(DEMO), *arguments))
        took.append(time.monotonic() - begun)
        error = error_of(path)
        path = folder / f"killed-{number}"
        share = float(np.random.default_rng([seed, number]).uniform(0.1, 0.9))
        _killed(path, arguments, share * statistics.median(took))
        _ended(_started("recover", str(path)))
        cut.append(error_of(path))
        whole.append(error)
        shares.append(share)
        yield {
            "runs": len(whole),
            **dict(zip(names, (whole, cut, shares, took), strict=True)),
            "error_over_uninterrupted": statistics.median(cut) / statistics.median(whole),
            "within_range": min(whole) <= statistics.median(cut) <= max(whole),
        }


def error_of(path: Path) -> float:
    """The run's error, radians."""
    summary = RunFolder(path).summary()
    if summary["status"] != "finished":
        raise RuntimeError(f"{path}: found a run that is {summary['status']}, expected one that has finished")
    return statistics.median(errors["run_end"] for errors in summary["phase_error"].values())


def _started(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "steering.cli", *words]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


def _ended(process: subprocess.Popen) -> None:
    try:
        code = process.wait(_LONGEST_S)
    finally:
        _kill(process)
    if code:
        raise RuntimeError(f"{' '.join(map(str, process.args[3:]))}: found exit code {code}, expected 0")


def _killed(path: Path, arguments: list[str], after_s: float) -> None:
    """A demo that is killed so many seconds after its start, and not before it has a checkpoint."""
    process, begun = _started("run", "--out", str(path), str(DEMO), *arguments), time.monotonic()
    try:
        while time.monotonic() < begun + after_s or not list((path / "checkpoints").glob("*/manifest.json")):
            if process.poll() is not None:
                raise RuntimeError(f"{path}: found a demo that ended before it was to be killed, expected a longer one")
            time.sleep(0.1)
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
