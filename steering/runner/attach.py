"""A run that another process has started, found by its folder alone."""

from __future__ import annotations

import getpass
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import astuple
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xarray as xr
from distributed import Client
from distributed.comm.core import FatalCommClosedError

from steering.campaign import Limits
from steering.clusters.credentials import lacks, security_of
from steering.runner import prometheus
from steering.runner.again import continued_by
from steering.runner.folder import RunFolder
from steering.runner.liveness import elsewhere, ended, gone, whereabouts
from steering.runner.noted import note_stop
from steering.runner.page_state import PageUpdate

ANSWER_S = 30.0
"""How long a command waits to be taken: the runner answers at once, unless its worker is busy starting up."""
LAST_WORDS_S = 20.0
"""How long an interrupted driver waits for the runner to write what there is."""
_ENDING_S = 60.0
"""How long the folder of a run whose cluster has closed may take to say how it ended."""
UNREACHED = (OSError, TimeoutError, CancelledError, RuntimeError)
"""What calls of a runner raise that cannot be reached any more."""


class Attached:
    """A running campaign, as any process can watch it and give it commands. Leaving it does not end the run."""

    def __init__(
        self,
        runner: Any,
        folder: RunFolder,
        client: Client | None = None,
        key: str | None = None,
        *,
        insecure: bool = False,
    ) -> None:
        """client: closed with this; None: somebody else's. key: of the runner, as the folder names it; None: it is not
        followed where another takes its place. insecure: as for `attach`, which the next runner is reached by."""
        self._runner = runner
        self._key = key
        self._insecure = insecure
        self._moving = threading.Lock()
        """A page asks from several threads."""
        self._client = client
        self.folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the run, which goes on."""
        if self._client is not None:
            self._client.close()

    @property
    def done(self) -> bool:
        """True once the run has ended, well or not."""
        return self.folder.summary().get("status") != "running" or gone(self.folder)

    def snapshot(self) -> dict[str, Any]:
        """The state of the run in numbers. Raises TimeoutError where the runner is busy, and RuntimeError or OSError
        where it cannot be reached any more."""
        self._moved()
        return self._runner.snapshot().result(timeout=ANSWER_S)

    def watch(self, every: float = 0.25) -> Iterator[dict[str, Any]]:
        """Snapshots until the run has ended, well or not."""
        while self.folder.summary().get("status") == "running":
            self._moved()
            try:
                yield self._runner.snapshot().result(timeout=ANSWER_S)
            except TimeoutError:  # it is busy, replacing its predictor say, or nobody is there any more
                if gone(self.folder):
                    return
            except UNREACHED:
                if self._ending():
                    return
                if self._key in (None, whereabouts(self.folder).get("key")):
                    raise
            time.sleep(every)

    def page_update(self, known: tuple[str, int, int] | None = None) -> PageUpdate:
        """What a page shows now; known: of the newest image it has, see `ImageChange`. Raises as `snapshot`."""
        self._moved()
        update: PageUpdate = self._runner.page_update(known).result(timeout=ANSWER_S)
        return update

    def live(self) -> xr.Dataset | None:
        """The live image of the scan being measured; None before the first frame. Raises as `snapshot`."""
        self._moved()
        image: xr.Dataset | None = self._runner.live().result(timeout=ANSWER_S)
        return image

    def result(self) -> dict[str, Any]:
        """Wait for the end. Returns the figures of summary.json; raises RuntimeError where the run ended early."""
        for _ in self.watch(every=0.5):
            pass
        self._ending()
        summary = self.folder.summary()
        if summary.get("status") != "finished":
            raise RuntimeError(f"{self.folder.name}: found a run that {ended(self.folder)}, expected one that finishes")
        return summary

    def metrics(self) -> bytes:
        """The newest figures of the run in Prometheus' text format.

        Raises LookupError where there are none (yet), ModuleNotFoundError without the extra `metrics` here.
        """
        if self._client is None:
            raise LookupError(f"{self.folder.name}: found a run without a client of its own, expected one by `attach`")
        return prometheus.text(self.folder.name, prometheus.newest(self._client, self.folder.name))

    def command(self, name: str, version: int | None = None, *, by: str = "", limits: Limits | None = None) -> str:
        """Tell the campaign to pause, resume, stop, approve, veto, limit or rollback (to `version`, or the one before).

        by: who gives it, for the log; this user where that is empty. limits: whose area and shortest dwell hold beside
        the workflow's own limits, until others are given; without them those of before are lifted. Returns what will be
        done; a stop that nobody takes now is noted, see `stop`. Raises ValueError where it cannot be done now.
        """
        asked: dict[str, Any] = {}
        if limits is not None:
            area = None if limits.area is None else astuple(limits.area)
            asked = {"area": area, "shortest_dwell": limits.shortest_dwell}
        try:
            self._moved()
            return str(self._runner.command(name, version, by or me(), **asked).result(timeout=ANSWER_S))
        except UNREACHED:
            if name != "stop" or self.done:
                raise
            return noted(self.folder, by or me())

    def give_up(self, reason: str) -> None:
        """End the run at once, whatever it is doing: it gives its workers back."""
        self._runner.give_up(reason).result(timeout=ANSWER_S)

    def hand_over(self) -> None:
        """Have the runner write a checkpoint and end: the run goes on from there with `steering recover`."""
        self._runner.hand_over().result(timeout=LAST_WORDS_S)

    def save(self) -> None:
        """Write the live images of a run that goes on into its folder."""
        self._runner.save().result(timeout=LAST_WORDS_S)

    def _ending(self) -> bool:
        """Wait for the folder to say how the run ended, or that another runner goes on; False where it does not end."""
        deadline = time.monotonic() + _ENDING_S
        while not self.done:
            where = whereabouts(self.folder)
            if self._key is not None and not where:  # a runner has handed over, and the next one is awaited
                deadline = time.monotonic() + _ENDING_S
            elif self._key not in (None, where.get("key")) or time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def _moved(self) -> None:
        """Where another runner has taken the place of the one that was asked, ask that from now on."""
        with self._moving:
            if self._key not in (None, whereabouts(self.folder).get("key", self._key)):
                other = attach(self.folder, insecure=self._insecure)
                self.close()
                self._runner, self._client, self._key = other._runner, other._client, other._key


def attach(path: str | Path | RunFolder, *, insecure: bool = False) -> Attached:
    """Take part in a run that another process has started, by the path of its folder.

    What comes back is what `start` returns: watch it, command it, wait for its result; `close` it, or use it in a
    `with`. insecure: also where the folder is another user's, whose cluster can then run code as this user: Dask
    unpickles what a scheduler sends. Raises FileNotFoundError where there is no run, RuntimeError where it has ended or
    cannot be reached from here, PermissionError where it is, or its credentials are, another user's.
    """
    folder = path if isinstance(path, RunFolder) else RunFolder(path)
    if folder.summary().get("status") != "running" or gone(folder):
        raise RuntimeError(
            f"{folder.name}: found a run that {ended(folder)}, expected one that goes on: "
            f"`steering status {folder.path}` says what it left"
        )
    where = whereabouts(folder)
    if not where:
        raise RuntimeError(
            f"{folder.name}: found no scheduler.json, expected a campaign that has started: wait until it measures"
        )
    if not insecure:
        _refuse_strangers(folder)
    security = security_of(folder.path, where.get("credentials"))
    if lacks(where["address"], security):
        raise RuntimeError(
            f"{folder.name}: found a cluster with TLS at {where['address']} and no credentials for it, expected them "
            "in Dask's configuration, as in that of the process that has started the run"
        )
    client = None
    try:
        client = Client(where["address"], timeout=10, security=security)
        published = client.get_dataset(where["runner"])
        if published.key != where.get("key", published.key):
            raise KeyError(where["key"])  # another run has the cluster by now
        return Attached(published.result(timeout=ANSWER_S), folder, client, published.key, insecure=insecure)
    except FatalCommClosedError as error:
        raise RuntimeError(
            f"{folder.name}: found a scheduler at {where['address']} that does not take the credentials here, "
            "expected those of this run: another run may have its port by now"
        ) from error
    except (OSError, TimeoutError, KeyError) as error:
        if client is not None:
            client.close()
        if machine := elsewhere(where):
            raise RuntimeError(
                f"{folder.name}: found a run on {machine} whose cluster listens to that machine alone, expected to be "
                f"asked there: `ssh {machine}`"
            ) from error
        raise RuntimeError(
            f"{folder.name}: found no scheduler at {where['address']} that knows the run ({type(error).__name__}), "
            "expected its cluster: it may have ended without a word, or cannot be reached from this machine"
        ) from error


def _refuse_strangers(folder: RunFolder) -> None:
    """Raise PermissionError where somebody else has written where the run's cluster is. Root may do everything here
    anyhow, and in a container files of all users may be its own."""
    owner = (folder.path / "scheduler.json").lstat().st_uid
    if owner not in (os.geteuid(), 0):
        raise PermissionError(
            f"{folder.name}: found a run of another user (number {owner}), expected one of {me()}, for whoever has the "
            f"cluster of a run can execute code in what attaches to it: `steering status {folder.path}` looks without "
            "that; if you trust that user, say --insecure (insecure=True)"
        )


def stop(path: str | Path | RunFolder, *, insecure: bool = False) -> str:
    """End a run in order. Where its runner cannot be reached now (its job has ended and the next one waits in a queue,
    it was lost, its workers have not come yet), the stop is noted in the run's folder and taken by the next runner.

    Returns what will be done, in words. Raises as `attach`, RuntimeError for a run that has ended.
    """
    folder = path if isinstance(path, RunFolder) else RunFolder(path)
    try:
        with attach(folder, insecure=insecure) as run:
            return run.command("stop")
    except PermissionError:
        raise
    except UNREACHED:
        if folder.summary().get("status") != "running":
            raise
        return noted(folder, me())


def noted(folder: RunFolder, by: str) -> str:
    """Note a stop; what that means, in words. Raises OSError."""
    note_stop(folder, by)
    if gone(folder):
        return (
            f"noted: {folder.name} has no process here any more; it ends in order where a job goes on with it, or by "
            f"{continued_by(folder)}"
        )
    if machine := elsewhere(whereabouts(folder)):
        return f"noted: {folder.name} is on {machine}, and its runner there ends it in order"
    return f"noted: nobody answers for {folder.name} now; its next runner ends it in order"


def me() -> str:
    """The user of this process, as the log of a run names people: user@host."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for its user
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
