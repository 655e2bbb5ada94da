"""Which GPU each process gets, by CUDA_VISIBLE_DEVICES; a worker of a job loads this module before anything else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVER = Path("/proc/driver/nvidia/gpus")


def visible(environment: Mapping[str, str] | None = None, driver: Path = _DRIVER) -> list[str]:
    """Names of the GPUs that processes started from here see: what CUDA_VISIBLE_DEVICES says, else all of the machine.

    Nothing of CUDA is started to find out.
    """
    listed = (os.environ if environment is None else environment).get(_VISIBLE)
    if listed is not None:
        return [name for word in listed.split(",") if (name := word.strip()) and name not in ("-1", "NoDevFiles")]
    return [str(number) for number, _ in enumerate(driver.iterdir())] if driver.is_dir() else []


def shared_out(gpus: Sequence[str], ranks: int) -> tuple[list[str], str]:
    """The GPU of each rank, and the one of the predictor and of label making.

    Ranks take the GPUs in turn. The predictor has the first one that no rank has; where each has a rank it shares the
    one with the fewest, of these the last. Empty strings where there is no GPU.
    """
    if not gpus:
        return [""] * ranks, ""
    of_ranks = [gpus[rank % len(gpus)] for rank in range(ranks)]
    if ranks < len(gpus):
        return of_ranks, gpus[ranks]
    fewest = min(of_ranks.count(gpu) for gpu in gpus)
    return of_ranks, [gpu for gpu in gpus if of_ranks.count(gpu) == fewest][-1]


def dask_setup(worker: Any) -> None:
    """Called by Dask in each worker of a job with GPUs, by `--preload`: of the job's GPUs, the process's own.

    The workers of a job with several are called NAME-0, NAME-1 and so on.
    """
    gpus = visible()
    if not gpus:
        return
    last = str(worker.name).rpartition("-")[2]
    os.environ[_VISIBLE] = gpus[(int(last) if last.isdigit() else 0) % len(gpus)]
