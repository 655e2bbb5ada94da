"""The driver's side of a run: start it on a cluster, watch it, wait for it."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from distributed import Client

from steering.clusters.credentials import FOLDER, folder_of
from steering.clusters.jobs import FILE as JOBS
from steering.clusters.own_job import JobEnds
from steering.clusters.roles import RUNNER, addresses, all_there, workers_of
from steering.runner.actors import LostForGood, unpublish
from steering.runner.again import continued_by
from steering.runner.attach import ANSWER_S, Attached
from steering.runner.checks import refuse_hidden, refuse_taken
from steering.runner.detached import start_detached
from steering.runner.experiment import Experiment
from steering.runner.folder import PUBLISHED_FOLDER, RunFolder
from steering.runner.handover import HandedOver
from steering.runner.liveness import whereabouts
from steering.runner.manifest import NoCheckpoint, any_whole, newest_number, newest_whole
from steering.runner.runner import Runner
from steering.runner.watch import OneWorker, fence_now

logger = logging.getLogger(__name__)

Show = Callable[[dict[str, Any]], None]
PUBLISHED = "steering-campaign"
"""Under which the runner is published on its cluster: there is one at a time."""
_RESTART_S = 120.0
"""How long a worker for the runner may take to be there again."""
_NOTICED_S = 5.0
"""How long the scheduler may take to notice that a worker is gone."""
_LOOK_S = 0.05


class Handle(Attached):
    """A run that this process has started: only this process gets its result."""

    def __init__(self, runner: Any, result: Any, folder: RunFolder, client: Client, place: OneWorker) -> None:
        super().__init__(runner, folder)
        self._result = result
        self._client = client
        self._place = place
        self._waited_for = False

    @property
    def lost(self) -> bool:
        """Whether the runner's worker is gone, and the run with it unless another one goes on. One that is frozen or
        cut off is taken off the cluster, once there is a checkpoint from which another one can go on."""
        workers = workers_of(self._client)
        if not self._place.silent(workers):
            return self._place.address not in workers
        if not any_whole(self.folder):
            if not self._waited_for:
                logger.warning("the runner's worker is silent, and there is no checkpoint yet: it is waited for")
            self._waited_for = True
            return False
        logger.warning("the runner's worker at %s is silent: treated as lost", self._place.address)
        fence_now(self._client, self._place.address)
        return True

    @property
    def done(self) -> bool:
        """True once the run has ended, well or not."""
        return bool(self._result.done())

    @property
    def failure(self) -> Exception | None:
        """What ended the run early; None where nothing did, or it goes on."""
        try:
            if self.done:
                self._result.result()
        except Exception as error:  # handed to who asks
            return error
        return None

    def watch(self, every: float = 0.25) -> Iterator[dict[str, Any]]:
        """Snapshots until the run has ended."""
        while not self.done:
            state = self._runner.snapshot()
            while not state.done():
                if self.lost:  # what is asked of it may never be answered
                    raise RuntimeError(f"found the runner's worker at {self._place.address} gone, expected it to go on")
                time.sleep(_LOOK_S)
            yield state.result()
            time.sleep(every)
        with contextlib.suppress(Exception):  # a run that failed says so through `result`
            yield self.snapshot()

    def result(self) -> dict[str, Any]:
        """Wait for the end. Returns the figures of summary.json; raises what ended the run early."""
        return self._result.result()


def show_all(states: Iterable[dict[str, Any]], show: Show | None) -> None:
    """Show every state, and then close what shows them, whatever happens on the way."""
    try:
        for state in states:
            if show is not None:
                show(state)
    finally:
        close = getattr(show, "close", None)
        if close is not None:
            close()


def start(
    experiment: Experiment, client: Client | str, folder: RunFolder | str | Path, *, detach: bool = False
) -> Attached:
    """Start a run on the cluster and return at once. The runner lives there, not in the driver.

    folder: of the run, or a path at which it is made, which must be new or empty.
    Its actor is published on the cluster, so that it outlives the driver where the cluster does, and withdrawn when the
    run has ended. detach: a process of its own watches over the run instead of this one, which may end; `client` may
    then name the cluster that it opens, as in start(experiment, "local", folder, detach=True), see `steering.cluster`.
    Raises RuntimeError where the cluster has no worker for the runner, another campaign is running there, or workers do
    not see the run's folder.
    """
    if detach:
        return start_detached(experiment, client, RunFolder.of(folder))
    if isinstance(client, str):
        raise TypeError(f"found the name of a cluster, {client!r}, expected a client: with cluster({client!r}) as ...")
    return _started(experiment, client, folder)


def _started(experiment: Experiment, client: Client, folder: RunFolder | str | Path, *, driven: bool = True) -> Handle:
    """driven: this process is the run's driver; else it only starts a runner."""
    found = addresses(workers_of(client), RUNNER)
    if not found:
        raise RuntimeError(
            f'found no worker with the resource {RUNNER}, expected one: start it with --resources "{RUNNER}=1"'
        )
    _refuse_second(client)
    folder = RunFolder.of(folder)  # made only where the cluster can take the run
    refuse_taken(folder)
    refuse_hidden(client, folder)
    [parts] = client.scatter([experiment], workers=found[:1], hash=False, direct=True)
    future = client.submit(Runner, parts, folder, actor=True, workers=found[:1], pure=False)
    runner = future.result()
    try:
        client.publish_dataset(future, name=PUBLISHED)
    except KeyError:  # another one was published in the same moment
        _refuse_second(client)
        raise
    attach = {"address": client.scheduler.address, "runner": PUBLISHED, "key": future.key, **runner.identity().result()}
    if (of := _credentials(client, folder) if driven else whereabouts(folder).get("credentials")) is not None:
        attach["credentials"] = of
    client.set_metadata(PUBLISHED_FOLDER, str(folder.path.absolute()))
    folder.write_file("scheduler.json", json.dumps(attach, indent=1).encode())
    # A cluster of this process ends with it, and whoever would watch there.
    go_on = _go_on_alone if client.cluster is None else None
    result = runner.run(PUBLISHED, client.id if driven else None, go_on)
    return Handle(runner, result, folder, client, OneWorker(found[0], experiment.frozen_s))


def _credentials(client: Client, folder: RunFolder) -> str | None:
    """By which others reach the cluster, as `security_of` takes it; None where it has none in a folder."""
    found = folder_of(client.security)
    if found is not None and found.resolve() == (folder.path / FOLDER).resolve():
        return FOLDER  # they go along where the run's folder is moved
    return None if found is None else str(found)


def _continued(experiment: Experiment, client: Client, folder: RunFolder, *, driven: bool = True) -> Handle | None:
    """Another runner in place of one that is lost or has handed over, from its newest checkpoint and log; None where
    there is no checkpoint, or no worker for a role within two minutes, time in a queue not counted."""
    try:
        manifest, _ = newest_whole(folder)
    except (NoCheckpoint, ValueError, OSError):
        return None
    if not client.sync(all_there, client, experiment.ranks_range[0], _RESTART_S):
        return None
    logger.warning("another runner goes on from checkpoint %d", manifest.number)
    return _started(experiment, client, RunFolder(folder.path, recovering=True), driven=driven)


def _go_on_alone(experiment: Experiment, client: Client, folder: RunFolder) -> None:
    """What the watcher of a run does where its runner is lost: it takes no part but to start another one."""
    handle = _continued(experiment, client, folder, driven=False)
    if handle is None:
        logger.error("%s: no other runner could go on; continue with %s", folder.path, continued_by(folder))
        return
    with contextlib.suppress(Exception):  # the runner itself says in the folder how it ended
        handle.result()


def _noticed(handle: Handle, error: Exception | None) -> bool:
    """Whether the runner is lost; after an error of a connection the scheduler has some seconds to notice it."""
    until = time.monotonic() + (_NOTICED_S if isinstance(error, OSError) else 0.0)
    try:
        while not handle.lost:
            if time.monotonic() >= until:
                return False
            time.sleep(_LOOK_S)
        return True
    except (OSError, RuntimeError) as unreached:
        raise LostForGood(
            "found the cluster's scheduler gone, expected it to outlive the run: continue with "
            f"{continued_by(handle.folder)}"
        ) from unreached


def _refuse_second(client: Client) -> None:
    """Raise RuntimeError where a campaign is running on the cluster; forget one whose runner is lost."""
    try:
        other = client.get_dataset(PUBLISHED)
    except KeyError:
        return
    try:
        name = other.result(timeout=ANSWER_S).identity().result(timeout=ANSWER_S)["name"]
    except TimeoutError:
        name = "of another folder (its runner is busy: it has not said its name)"
    except Exception:  # its worker is gone, and the run with it
        client.sync(unpublish, client, PUBLISHED)
        return
    raise RuntimeError(
        f"found the campaign {name} running on the cluster at {client.scheduler.address}, expected a cluster without "
        "one: wait for its end, end it with `steering stop` and its folder, or start another cluster"
    )


def run(
    experiment: Experiment, client: Client, folder: RunFolder | str | Path, *, show: Show | None = None
) -> dict[str, Any]:
    """Run an experiment to its end, showing snapshots on the way. Returns the figures of summary.json.

    folder: of the run, or a path at which it is made, which must be new or empty. show: called with each snapshot;
    however the run ends, its `close` is called where it has one. Interrupted from the keyboard, `run` first lets the
    runner write the live images, and where its own job ends a checkpoint; whatever ends it early ends the run on the
    cluster too. Where the runner's worker is lost or about to end, another runner goes on from the newest checkpoint.
    """
    handle = _started(experiment, client, folder)
    folder = handle.folder

    def states() -> Iterator[dict[str, Any]]:
        nonlocal handle
        last = 0
        while True:
            try:
                yield from handle.watch()
                error: Exception | None = handle.failure
            except Exception as failed:
                error = failed
            over = isinstance(error, HandedOver) or _noticed(handle, error)
            if isinstance(error, LostForGood) and (folder.path / JOBS).exists():  # what is lost there is replaced
                over, last = newest_number(folder) > last, newest_number(folder)
            again = _continued(experiment, client, folder) if over else None
            if again is None:
                if error is not None:
                    raise error
                return
            handle = again

    try:
        show_all(states(), show)
        return handle.result()
    except BaseException as ending:
        with contextlib.suppress(Exception):  # what ended it is what counts
            if isinstance(ending, JobEnds):
                handle.hand_over()
            elif isinstance(ending, KeyboardInterrupt):
                handle.save()
            handle.give_up("the process that watched over the run has ended it")
        raise
