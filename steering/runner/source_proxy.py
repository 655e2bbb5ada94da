"""The source as the runner asks it: where it fails, falls silent or is lost, another one goes on from it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Client

from steering.campaign import (
    ChunkArrived,
    DecisionSuggested,
    Event,
    FellBack,
    FrameRefused,
    FramesLost,
    ScanRevisited,
    SourceEnded,
    SourceReopened,
    SourceSilent,
    Steer,
)
from steering.clusters.roles import SOURCE, worker_for, workers_now
from steering.records import Ids
from steering.records.optional_parts import offers
from steering.runner.actors import ActorHandle, LostForGood, call, losses, release, retrieved, while_there
from steering.runner.adoption import adopted, place_source, withdraw
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.source_actor import SourceActor
from steering.runner.source_events import GoOn, SourceFailed, SourceResume, Standing
from steering.runner.source_known import Known, SinceCheckpoint

_FIRST_REST_S, _LONGEST_REST_S = 0.5, 60.0
"""A source that fails is opened again after so long, and each time in a row after twice as long."""
_MOST_FAILURES = 10
"""So often in a row, without a frame in between, one that raises is opened again: for about five minutes. One that is
silent is opened again for ever: the beam may be off."""
_RESTART_S = 120.0
"""How long a worker may take to be there again: importing torch from a slow disk needs a minute."""
_LOOK_S = 0.25


class SourceProxy:
    """Asks the source's actor, whichever it is by now.

    A source that has `position` and `resume` (see the contract, `Source`) is opened again where it raises OSError or
    EOFError, as what is outside fails (any other error is one of the data or of the code, and ends the run), is silent
    for `silent_s` although positions are due, or is lost with its worker: a new one, as it was made, goes on from the
    newest position, with the decisions since then; ids of frames that have arrived are not handed out again. Where it
    has `again` too, it gives the frames of scans that are not saved yet once more, for a predictor that may be lost
    later. A source without these verbs ends the run where it fails, as its worker's loss does.
    """

    def __init__(
        self,
        client: Client,
        experiment: Experiment,
        *,
        due: Callable[[], bool],
        reported: Callable[[], dict[str, set[int]]],
        emit: Callable[[Event], None],
        spool: Path | None = None,
        folder: RunFolder | None = None,
    ) -> None:
        """experiment: its source, as it was made. due: whether a frame is asked for that has not come. reported: ids of
        the frames that the predictor has reported, by scan. emit: where SourceSilent and SourceReopened go. spool: see
        SourceActor. folder: the run's."""
        self._client = client
        self._spool, self._folder = spool, folder
        self._unsteered_s = experiment.unsteered_s
        self.decided: set[tuple[float, float]] = set()
        """Positions decided on in this scan, as far as this proxy knows."""
        self._description: Any = experiment.source
        self._keep_bytes = experiment.prediction.keep_bytes
        self._silent_s = experiment.silent_s
        self._due = due
        self._reported = reported
        self._emit = emit
        self._handle: ActorHandle | None = None
        self._predictor: tuple[Any, int] = (None, 0)
        self._since = SinceCheckpoint(None)
        self._gives_again = experiment.checkpoint_s is not None and offers(experiment.source, "again")
        self._decisions: list[Steer | FellBack] = []
        """Those that the newest position does not include."""
        self._known = Known(handed=defaultdict(list))
        self._scans: dict[str, str] = {}
        """Names of the scans so far, in their order, and how the source calls each."""
        self._failures = 0
        self._frame_s = 1 / experiment.source.frame_rate
        """Exposure of a position whose decision names none."""
        self._slowest = self._frame_s
        """Longest exposure of what may be due, seconds."""
        self._heard = time.monotonic()
        self._silent = self._closed = self._over = self._ended = False
        self._number = 0
        """Actors that were lost before this one."""
        self._name = secrets.token_hex(8)
        """By which the actor knows this proxy from that of another runner."""
        self._steering = asyncio.Lock()
        """Held while the source hears of a decision, and while another one goes on with all of them."""
        self._changing = asyncio.Lock()
        self._hearing: asyncio.Future | None = None
        self._waiting: list[Event] = []
        """What the runner has not heard yet."""
        self.lost = Ids()
        """Of frames that had arrived and that the source could not give again."""
        self.frames = self.dropped = 0
        self.first = self.last = 0.0

    @property
    def address(self) -> str:
        """Of its worker; empty before it is there."""
        return "" if self._handle is None else self._handle.address

    @property
    def _reopens(self) -> bool:
        return offers(self._description, "position") and offers(self._description, "resume")

    async def start(self, worker: str, predictor: Any, resume: SourceResume | None = None) -> None:
        """Begin to measure, on this worker, and to send what is measured to the predictor, which is number 0; resume:
        go on from there."""
        self._predictor = (predictor, 0)
        if resume is not None:
            self._resume(resume)
        if self._reopens and self._known.position is None:
            self._known.position = self._description.position()  # of one that has not begun
        if self._gives_again:
            known, arrived = self._known, () if resume is None else resume.handed
            self._since = SinceCheckpoint(known.position, known.applied, self._decisions, arrived)
        self._handle = (
            None if resume is None else await adopted(self._client, self._folder, predictor, resume, self._name)
        )
        if self._handle is None:
            self._handle = await place_source(self._client, self._actor(), worker)
            await self.ask("start", predictor, 0, resume)
        self._heard = time.monotonic()

    async def beat(self, reserve: tuple[tuple[float, float], ...]) -> None:
        """See SourceActor.beat."""
        await self.ask("beat", reserve)

    def _resume(self, resume: SourceResume) -> None:
        position = resume.position or {}
        self._known.position, self._known.applied = position.get("source"), int(position.get("steered", 0))
        self._scans = dict(position.get("visits") or {})
        for i, scan in resume.handed.items():
            self._known.handed[scan].append(i)
        for scan, ids in self._reported().items():  # also what arrived before the checkpoint and was predicted after it
            self._known.handed[scan] += ids.difference(self._known.handed[scan])
        self._decisions = self._after(resume.decisions)
        for one in resume.decisions:
            self._note(one)
        self.frames, self.last, self._ended = resume.frames, time.time(), resume.ended
        self.first = self.last - float(position.get("acquire_s", 0.0))

    def _after(self, decisions: Iterable[Steer | FellBack]) -> list[Steer | FellBack]:
        """Those that the newest position does not include."""
        return [one for one in decisions if isinstance(one, FellBack) or one.id > self._known.applied]

    def _note(self, one: Steer | FellBack) -> None:
        decision = one if isinstance(one, FellBack) else one.decision
        self.decided.update(decision.positions)
        if isinstance(decision, DecisionSuggested):
            self._slowest = max(self._slowest, *(decision.dwell or (self._frame_s,)))
            if decision.stop:
                self.decided.clear()

    def _actor(self) -> SourceActor:
        return SourceActor(
            self._description,
            keep_bytes=self._keep_bytes,
            spool=self._spool,
            folder=self._folder,
            unsteered_s=self._unsteered_s,
            holder=self._name,
        )

    async def position(self) -> dict[str, Any]:
        """Where the source is in its stream, in JSON's types: all that `SourceResume` needs to go on from here."""
        asked = self._since.asked()
        found: dict[str, Any] = await self.ask("position")
        if self._gives_again:
            self._since.mark(found["source"], found["steered"], asked)
        return {**found, "acquire_s": self.last - self.first}

    def rebase(self) -> None:
        """The checkpoint with the newest `position` is on the disk."""
        self._since.commit()

    async def ask(self, method: str, *arguments: Any) -> Any:
        """The actor's answer; where its worker is lost meanwhile, that of the one that takes its place."""
        while True:
            async with self._changing:
                handle, number = self._handle, self._number
            if handle is None:
                raise RuntimeError("found no source yet, expected `start` to be called")
            try:
                return await while_there(
                    self._client, handle.address, call(handle.actor, "asked", self._name, method, *arguments)
                )
            except Exception as error:
                if not await self._replaced(number, error):
                    raise

    async def apply(self, steer: Steer) -> None:
        """Tell the source where to measure next."""
        async with self._steering:
            self._note(steer)
            if self._reopens:
                self._decisions.append(steer)
                self._since.steered(steer)
            await self.ask("apply", steer)

    async def go_on_with(self, predictor: Any, number: int) -> list[int]:
        """See SourceActor.go_on_with."""
        self._predictor = (predictor, number)
        sent: list[int] = await self.ask("go_on_with", predictor, number)
        return sent

    async def let_go(self, scan: str) -> None:
        """Keep the frames of a scan no longer."""
        self._known.handed.pop(scan, None)
        await self.ask("let_go", scan)

    async def figures(self) -> dict[str, Any]:
        """What was acquired so far, in numbers."""
        live = getattr(self._description, "streams", None) is not None
        return {
            "streams": await self.ask("streams") if live else {},
            "frames_acquired": self.frames + self.dropped,
            "frames_dropped": self.dropped,
            "acquire_s": self.last - self.first,
        }

    async def release(self) -> None:
        """End the source: the run has ended, and nobody takes its place."""
        self._over = True
        if self._handle is not None:
            if not await release(self._client, self._handle, "asked", self._name, "release"):
                return  # another runner goes on with it
            with contextlib.suppress(Exception):  # the run has ended, whatever becomes of its source
                await withdraw(self._client)

    async def events(self) -> list[Event]:
        """What has happened at the source since the last call; waits until there is something, and where the source
        fails, until it is open again. Raises what ends the run."""
        while True:
            if self._hearing is None:
                self._hearing = asyncio.ensure_future(self.ask("events"))
                self._hearing.add_done_callback(retrieved)
            await asyncio.wait({self._hearing}, timeout=_LOOK_S)
            found: list[Event] = []
            if self._hearing.done():
                hearing, self._hearing = self._hearing, None
                found = hearing.result()
            elif self._fell_silent():
                found = [self._silence()]
            await self._take(found)
            if self._waiting:
                waiting, self._waiting = self._waiting, []
                return waiting

    async def close(self) -> None:
        """No further frame is wanted: the source ends with what it has measured."""
        self._closed = True
        await self.ask("close")

    def _fell_silent(self) -> bool:
        if not self._due() or self._over or self._ended:
            self._heard, self._slowest = time.monotonic(), self._frame_s
            return False
        return not self._silent and time.monotonic() - self._heard > self._silent_s + self._slowest

    def _silence(self) -> SourceFailed:
        quiet = time.monotonic() - self._heard
        self._silent = True
        self._emit(SourceSilent(time=time.time(), since=time.time() - quiet))
        return SourceFailed(time=time.time(), error=TimeoutError(f"found no frame for {quiet:.0f} s"), silent=True)

    async def _take(self, found: list[Event]) -> None:
        for event in found:
            match event:
                case Standing():
                    self._known.position = event.position
                    self._known.applied = event.applied
                    self._decisions = [one for one in self._after(self._decisions) if isinstance(one, Steer)]
                case SourceFailed():
                    await self._open_again(event)
                case SourceEnded():
                    self._ended = True
                    self._waiting.append(event)
                case _:
                    if isinstance(event, FellBack):
                        self._since.fell_back()
                    self._waiting.append(self._arrived(event))

    def _arrived(self, event: Event) -> Event:
        match event:
            case ScanRevisited():
                self._scans[event.visit] = event.scan
            case ChunkArrived():
                self._scans.setdefault(event.scan, event.scan)
                self._heard, self._silent, self._failures = time.monotonic(), False, 0
                self.first, self.last = self.first or event.time, event.time
                self.frames += len(event.frame_ids)
                self._known.handed[event.scan] += event.frame_ids
                self._since.came(event.frame_ids)
            case FramesLost():
                self.lost.add(event.frame_ids)
            case FrameRefused(positions=()):
                self.dropped += event.count
        return event

    async def _open_again(self, failed: SourceFailed) -> None:
        """Have a new source go on, after a rest. Raises the failure where that is not possible."""
        if not isinstance(failed.error, OSError | EOFError):
            raise failed.error
        self._failures += 1
        if not self._reopens and failed.silent:
            return  # it may come back by itself
        if not self._reopens or (self._failures > _MOST_FAILURES and not failed.silent):
            raise failed.error
        begun = time.monotonic()
        await asyncio.sleep(min(_FIRST_REST_S * 2 ** min(self._failures - 1, 20), _LONGEST_REST_S))
        async with self._steering:
            await self.ask("go_on", self._description, self._point(failed.position))
        self._reopened(f"{type(failed.error).__name__}: {failed.error}", begun)

    def _reopened(self, reason: str, begun: float) -> None:
        self._heard, self._silent = time.monotonic(), False
        seconds = time.monotonic() - begun
        self._emit(SourceReopened(time=time.time(), reason=reason, attempt=self._failures, seconds=seconds))

    def _point(self, position: Any = None) -> GoOn:
        """Where another source goes on. position: what the one that failed has said last; None: it is lost, and with it
        the frames that it has kept."""
        known, found = self._known, self._known.point(self._decisions, self._scans)
        if position is None:
            return self._since.instead_of(found)
        steered = max([known.applied, *(one.id for one in self._decisions if isinstance(one, Steer))])
        return replace(found, position=position, applied=steered, decisions=())

    async def _replaced(self, number: int, error: Exception) -> bool:
        """Replace the actor of this number if it is lost; False where it is not."""
        handle, begun = self._handle, time.monotonic()
        if self._over or handle is None:
            return False
        if self._number == number and not await losses(self._client, [handle]):
            return self._number != number
        async with self._changing:
            if self._number != number:
                return True
            if not self._reopens:
                raise LostForGood(
                    f"the source's worker is lost, and {type(self._description).__name__} has no `position` and "
                    "`resume`, with which another one could go on from it"
                ) from error
            self._failures += 1
            self._hear_of_the_last()
            if not await self._placed_another():
                raise LostForGood(
                    f"found no worker with the resource {SOURCE} within {_RESTART_S:.0f} s of the loss of one, "
                    f'expected another: start workers under a nanny, or a second one with --resources "{SOURCE}=1"'
                ) from error
            self._number += 1
            self._reopened("its worker was lost", begun)
            return True

    def _hear_of_the_last(self) -> None:
        """Frames that the lost source has sent to the predictor and had no time to tell of have arrived."""
        for scan, ids in self._reported().items():
            if new := sorted(ids.difference(self._known.handed[scan])):
                event = ChunkArrived(time=time.time(), scan=scan, frame_ids=tuple(new))
                self._waiting.append(self._arrived(event))

    async def _placed_another(self) -> bool:
        """Whether a worker for it has come."""
        while (worker := await worker_for(self._client, SOURCE, _RESTART_S)) is not None:
            try:
                self._handle = await while_there(self._client, worker, self._begin(worker))
                return True
            except Exception:
                if worker in await workers_now(self._client):
                    raise
        return False

    async def _begin(self, worker: str) -> ActorHandle:
        handle = await place_source(self._client, self._actor(), worker)
        await call(handle.actor, "start", *self._predictor, self._point())
        if self._closed:
            await call(handle.actor, "close")
        return handle
