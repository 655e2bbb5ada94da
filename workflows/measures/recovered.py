"""Demos that are killed with all their processes and recovered, beside demos that nobody disturbs."""

import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from steering import RunFolder

DEMO = Path(__file__).parents[1] / "simulated_drift.py"
_LONGEST_S = 1800.0


def recovered(folder: Path, arguments: list[str], runs: int, seed: int = 0) -> dict[str, Any]:
    """So many demos undisturbed, and as many killed at a random moment after their first checkpoint and recovered.

    The error of a run: the median over its samples of the phase error of the final version. Raises RuntimeError for a
    run that does not end well.
    """
    rng = np.random.default_rng(seed)
    whole: list[float] = []
    cut: list[float] = []
    took: list[float] = []
    shares: list[float] = []
    for number in range(runs):
        path, begun = folder / f"whole-{number}", time.monotonic()
        _ended(_started("run", "--out", str(path), str(DEMO), *arguments))
        took.append(time.monotonic() - begun)
        whole.append(error_of(path))
        path = folder / f"killed-{number}"
        shares.append(float(rng.uniform(0.1, 0.9)))
        _killed(path, arguments, shares[-1] * statistics.median(took))
        _ended(_started("recover", str(path)))
        cut.append(error_of(path))
    return {
        "runs": runs,
        "uninterrupted": whole,
        "recovered": cut,
        "killed_after_share": shares,
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
