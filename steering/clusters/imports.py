"""What the workers of each role import before anything is asked of them: each worker of a job loads this module first.

Workers that are placed one after the other would else import one after the other, while the run waits for each.
"""

from __future__ import annotations

import importlib
from typing import Any

from steering.clusters.roles import INFERENCE, LABEL, RUNNER, SOURCE, TRAINER

# The first optimiser made imports _dynamo, 1.3 s; dask.array, zarr and our own rooms cost a worker 0.4 to 0.8 s each.
OF_ROLE = {
    TRAINER: ("torch", "torch._dynamo", "steering.learning.rank"),
    INFERENCE: ("torch", "dask.array", "zarr", "steering.inference.predictor"),
    SOURCE: ("steering.runner.source_actor",),
    LABEL: ("torch", "steering.ptychography"),
    RUNNER: ("dask.array", "zarr", "steering.runner.runner"),
}


def every() -> list[str]:
    """Of all roles together, each once."""
    return list(dict.fromkeys(name for names in OF_ROLE.values() for name in names))


def dask_setup(worker: Any) -> None:
    """Called by Dask in each worker of a job, by `--preload`, before the scheduler knows of it."""
    for role, names in OF_ROLE.items():
        for name in names if worker.state.total_resources.get(role) else ():
            importlib.import_module(name)
