"""What a site needs to run jobs: one small TOML file, with an example in workflows/site.toml."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any

from dask.utils import parse_bytes

from steering.clusters.roles import INFERENCE, LABEL, RUNNER, SOURCE, TRAINER

BEAMLINE = "beamline"
"""The job that carries the roles source, label and runner."""
CARRIES = {TRAINER: (TRAINER,), INFERENCE: (INFERENCE,), BEAMLINE: (SOURCE, LABEL, RUNNER)}
"""Which roles the workers of each kind of job carry."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kind of job. What is None or empty is left to the queue's own default."""

    cores: int = 1
    """Of the whole job."""
    memory: str = "4GiB"
    """Of the whole job."""
    gpus: int = 0
    """Of the whole job; each of its ranks has one of them to itself, in turn."""
    walltime: str = "01:00:00"
    partition: str | None = None
    """Or queue, as other systems call it."""
    account: str | None = None
    ranks: int = 1
    """Training ranks in a job: processes on one node. Of trainer jobs only."""
    directives: tuple[str, ...] = ()
    """More lines for the head of the job script, such as "--exclusive"."""
    disk: str = "2GiB"
    """HTCondor asks for it."""

    def __post_init__(self) -> None:
        if min(self.cores, self.ranks) < 1 or self.gpus < 0:
            raise ValueError(
                f"found cores={self.cores}, ranks={self.ranks}, gpus={self.gpus}, expected at least 1, 1 and 0"
            )
        try:
            enough = min(parse_bytes(self.memory), parse_bytes(self.disk)) > 0
        except ValueError:
            enough = False
        if not enough:
            raise ValueError(
                f"found memory={self.memory!r}, disk={self.disk!r}, expected sizes of a whole job such as '16GiB'"
            )
        if self.cores < self.ranks:
            raise ValueError(f"found {self.cores} cores for {self.ranks} ranks of a job, expected one for each or more")


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site: its three kinds of job, and what all of them share."""

    trainer: Job = field(default_factory=Job)
    inference: Job = field(default_factory=Job)
    beamline: Job = field(default_factory=lambda: Job(cores=2))
    interface: str | None = None
    """Network interface of scheduler and workers, such as "ib0"; None: that of the driver's own address, and on each
    node the one by which it reaches the driver. HTCondor needs it."""
    python: str = sys.executable
    """On the nodes."""
    modules: tuple[str, ...] = ()
    """Loaded by `module load` before the worker starts."""
    prologue: tuple[str, ...] = ()
    """More shell lines before it."""
    refused: tuple[str, ...] = ()
    """Directives that the site does not take, such as "--mem": lines with these words are left out."""
    scratch: str | None = None
    """Folder of the workers on their node; None: the run's folder."""
    start_s: float = 300.0
    """How long a worker looks for the scheduler before it gives up."""
    handover_s: float = 300.0
    """How long before the end of a job its successor is submitted."""
    deadline_s: float | None = None
    """How long a run waits for the workers of its roles to begin; None: for as long as the queue takes."""

    def __post_init__(self) -> None:
        times = {"start_s": self.start_s, "handover_s": self.handover_s, "deadline_s": self.deadline_s}
        for name, seconds in times.items():
            if seconds is not None and not 0 < seconds < inf:
                raise ValueError(f"found {name}={seconds}, expected seconds above 0")

    @property
    def jobs(self) -> dict[str, Job]:
        """The kinds of job by their names."""
        return {TRAINER: self.trainer, INFERENCE: self.inference, BEAMLINE: self.beamline}


_SHARED = {f.name: f for f in fields(Site) if f.name not in CARRIES}
_OF_JOB = {f.name: f for f in fields(Job)}
_TYPES = {"int": int, "float": float, "float | None": float, "str": str, "str | None": str, "tuple[str, ...]": list}


def read_site(path: str | Path | None) -> Site:
    """The site that a TOML file describes; without a file one whose queue has defaults for everything.

    Keys of a Job at the top of the file hold for every kind of job, and those in [trainer], [inference] and [beamline]
    for this one. Raises FileNotFoundError, and ValueError for what does not belong into such a file.
    """
    if path is None:
        return Site()
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: found no such file, expected a site file as workflows/site.toml") from None
    except OSError as error:
        raise OSError(
            f"{path}: found no file to read ({error.strerror}), expected one as workflows/site.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: found no valid TOML ({error}), expected a site file as workflows/site.toml"
        ) from None
    tables = {name: content.pop(name) for name in CARRIES if name in content}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: found {name} = {table!r}, expected a table: a line [{name}] and its keys below")
    shared = {key: content.pop(key) for key in list(content) if key in _SHARED}
    try:
        site = Site(**_checked(path, "", shared, _SHARED))
        every = _checked(path, "", content, _OF_JOB)
        jobs: dict[str, Any] = {
            name: replace(job, **{**every, **_checked(path, f"[{name}] ", tables.get(name, {}), _OF_JOB)})
            for name, job in site.jobs.items()
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    return replace(site, **jobs)


def _checked(path: Path, where: str, content: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in content.items():
        if key not in known:
            names = ", ".join(sorted({*_SHARED, *_OF_JOB}))
            raise ValueError(f"{path}: found {where}{key}, expected some of {names}, and tables {', '.join(CARRIES)}")
        kind = _TYPES[known[key].type]
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{path}: found {where}{key} = {value!r}, expected {known[key].type}")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise ValueError(f"{path}: found {where}{key} = {value!r}, expected a list of strings")
        found[key] = tuple(value) if isinstance(value, list) else value
    return found
