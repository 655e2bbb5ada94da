"""The jobs of a run while it goes on: watched, said in jobs.json, and followed by others where they end."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Client

from steering.clusters.job_options import SYSTEMS
from steering.clusters.job_states import JobState, last_words
from steering.clusters.roles import announce, lay_down, missing, workers_of
from steering.clusters.site import CARRIES
from steering.clusters.succession import Place, due, lays_down, lead, successor
from steering.records.whole_file import write_whole

FILE = "jobs.json"
"""In the run's folder: which jobs it has, and what the batch system says of them."""
LOOK_S = 2.0
_AGAIN_S = 30.0
"""After a job was refused in the middle of a run."""

logger = logging.getLogger("steering.clusters")


class Jobs:
    """Keeps a job in each place for as long as the run goes on."""

    def __init__(self, cluster: Any, client: Client, folder: Path, *, system: str, handover: float) -> None:
        self._cluster = cluster
        self._client = client
        self._folder = folder
        self._system = system
        self._handover = handover
        self._places: list[Place] = []
        self._leaving: dict[str, tuple[Place, int]] = {}
        """By their names those whose successor is submitted, with its index in `_places`, until their jobs are over."""
        self._laid_down: set[str] = set()
        """Of these, whose workers have no role any more."""
        self._given_up: dict[str, str] = {}
        self._spec: Callable[[Place], dict[str, Any]]
        self._states: dict[str, JobState] = {}
        self._stop = threading.Event()
        self._not_before = 0.0
        self._written = b""

    @contextmanager
    def kept(self, places: Sequence[Place], spec: Callable[[Place], dict[str, Any]]) -> Iterator[None]:
        """Submit a job for each place and keep one there until the block is left.

        Raises RuntimeError, in the batch system's own words, where it refuses one.
        """
        self._spec = spec
        self._places = self._submitted(list(places))
        self._write()
        watcher = threading.Thread(target=self._watch, name="steering-jobs", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._stop.set()
            watcher.join()

    def wait(self, ranks: int, timeout: float | None) -> None:
        """Wait until every role has a worker, and trainer as many as `ranks`. Raises TimeoutError, RuntimeError."""
        began, said = time.monotonic(), ""
        while lacks := missing(workers_of(self._client), ranks=ranks):
            if self._given_up:
                raise RuntimeError("; ".join(self._given_up.values()))
            said = self._say(said)
            if timeout is not None and time.monotonic() > began + timeout:
                raise TimeoutError(
                    f"found no worker for {', '.join(lacks)} after {timeout:g} s, expected them by then: {said}"
                )
            time.sleep(0.1)

    def _say(self, before: str) -> str:
        """Log what is waited for, where that has changed."""
        waits = [
            f"{place.name}, job {place.job}: {state.state}{f' ({state.reason})' if state.reason else ''}"
            for place in self._places
            if not place.came and (state := self._states.get(place.job))
        ]
        text = "waiting for " + "; ".join(waits) if waits else before
        if text != before:
            logger.info(text)
        return text

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                self.look()
            except Exception:  # the run does not end because its jobs cannot be looked at now
                logger.exception("looking at the jobs failed; it is tried again")

    def look(self, now: float | None = None) -> None:
        """Ask once how the jobs stand, and submit others for those that are over or near their end. A thread of this
        object does so again and again. now: seconds since the epoch; None: by the clock."""
        now = time.time() if now is None else now
        names = {str(worker["name"]) for worker in workers_of(self._client).values()}
        self._places = [
            replace(place, came=place.came or any(_of(place, name) for name in names)) for place in self._places
        ]
        leaving = (place for place, _ in self._leaving.values())
        states = SYSTEMS[self._system].states([place.job for place in (*self._places, *leaving)])
        if states is None:
            return
        self._states = states
        self._places = [
            replace(place, lead=lead(states.get(place.job), now, self._handover)) if place.lead is None else place
            for place in self._places
        ]
        self._follow(states, now)
        self._hand_over(names, now)
        self._write()

    def _follow(self, states: Mapping[str, JobState], now: float) -> None:
        """Submit another job wherever one is over, or nears its end."""
        for name, (place, _) in list(self._leaving.items()):
            if place.job not in states:
                self._cluster.worker_spec.pop(name, None)
                del self._leaving[name]
        wanted = [index for index, place in enumerate(self._places) if self._wanted(place, states, now)]
        if wanted and now >= self._not_before:
            self._replace(wanted, states, now)

    def _hand_over(self, names: set[str], now: float) -> None:
        """Have the workers of jobs that end lay down their roles once their successor is there, or the end is near."""
        for old, index in self._leaving.values():
            heir = self._places[index]
            arrived = sum(_of(heir, name) for name in names) >= heir.processes
            if old.name in self._laid_down or not lays_down(old.kind, self._states.get(old.job), now, heir=arrived):
                continue
            lay_down(self._client, [name for name in names if _of(old, name)])
            self._laid_down.add(old.name)

    def _wanted(self, place: Place, states: Mapping[str, JobState], now: float) -> bool:
        """Whether a place needs another job."""
        if place.name in self._given_up:
            return False
        what = due(place, states.get(place.job), now)
        if what == "give up":
            self._given_up[place.name] = self._failed(place)
        return what == "replace"

    def _replace(self, wanted: list[int], states: Mapping[str, JobState], now: float) -> None:
        for old in (self._places[index] for index in wanted):
            if old.job not in states:
                self._cluster.worker_spec.pop(old.name, None)
        try:
            fresh = self._submitted([successor(self._places[index]) for index in wanted])
        except RuntimeError as refused:
            logger.warning("%s; it is tried again in %.0f s", refused, _AGAIN_S)
            self._not_before = now + _AGAIN_S
            return
        for index, place in zip(wanted, fresh, strict=True):
            old = self._places[index]
            logger.info("job %s takes the place of job %s (%s)", place.job, old.job, place.name)
            self._places[index] = place
            if old.job in states:
                self._leaving[old.name] = (old, index)

    def _submitted(self, places: list[Place]) -> list[Place]:
        """The places with the ids of their jobs. Raises RuntimeError where one is refused."""
        for place in places:
            self._cluster.worker_spec[place.name] = self._spec(place)
        try:
            self._cluster.sync(self._cluster._correct_state)
        except Exception as error:
            for place in places:
                self._cluster.worker_spec.pop(place.name, None)
                worker = self._cluster.workers.get(place.name)
                if worker is not None:
                    # A cluster that closes expects that nobody holds its jobs any more; the error's traceback does.
                    self._cluster._created.discard(worker)
                    if worker.job_id is None:  # else Dask would take it for submitted
                        del self._cluster.workers[place.name]
            raise RuntimeError(f"found a job that {self._system} refuses: {refusal_of(error)}") from error
        return [replace(place, job=str(self._cluster.workers[place.name].job_id)) for place in places]

    def _failed(self, place: Place) -> str:
        where, own = self._folder / "jobs", re.compile(rf"(?<!\d){re.escape(place.job)}(?!\d).*\.err$")
        logs = [path for path in sorted(where.glob("*.err")) if own.search(path.name)]
        words = last_words(logs[-1].read_text(errors="replace")) if logs else "no log of it there"
        advice = "" if logs else ": choose a folder for the run on a file system that all nodes share"
        return (
            f"found {place.failures + 1} jobs of {place.kind} in a row that ended before their worker came, the last "
            f"one job {place.job}{f' ({words})' if words else ''}, expected a worker: see {where}{advice}"
        )

    def _write(self) -> None:
        """Write jobs.json where something has changed, whole."""
        jobs = [
            {
                "job": place.job,
                "kind": place.kind,
                "roles": CARRIES[place.kind],
                "worker": place.came,
                "state": state.state if state else "",
                "reason": state.reason if state else "",
                "ends": state.ends if state else None,
            }
            for place in self._places
            for state in [self._states.get(place.job)]
        ]
        current = {"system": self._system, "jobs": jobs, "given_up": list(self._given_up.values())}
        content = json.dumps(current, indent=1).encode()
        if content != self._written:
            given_up = self._given_up
            waiting = [place.kind for place in self._places if not place.came and place.name not in given_up]
            announce(self._client, sorted({role for kind in waiting for role in CARRIES[kind]}))
            write_whole(self._folder / FILE, content)
            self._written = content


def _of(place: Place, worker: str) -> bool:
    """Whether a worker of this name is one of the place's job."""
    return worker == place.name or worker.startswith(f"{place.name}-")


def refusal_of(error: BaseException) -> str:
    """What a batch system itself said, of an error of dask-jobqueue."""
    text = str(error)
    said = text.partition("stderr:\n")[2].strip() or text
    return " ".join(said.split())
