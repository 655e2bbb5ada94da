"""The predictor as the runner asks it: when it is lost another takes its place, and the question is put again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from distributed import Client

from steering.campaign import (
    AskPolicy,
    DecisionSuggested,
    Event,
    FrameSetAside,
    FramesLost,
    PredictionReady,
    PredictorReplaced,
)
from steering.clusters.roles import INFERENCE, worker_for, workers_now
from steering.inference import Answers, Installed, PolicyAnswer, Predictor, ResumeState, SavedPredictor
from steering.records import Ids
from steering.runner.actors import (
    ActorHandle,
    LostForGood,
    call,
    losses,
    place,
    release,
    retrieved,
    while_there,
)
from steering.runner.source_proxy import SourceProxy

_ATTEMPTS = 3
"""Predictors that are tried one after the other when each is lost before it is ready."""
_READY_S = 300.0
"""How long the next predictor may take to be there, as at the start of a run."""
_RESTART_S = 120.0
"""How long a worker may take to be there again: importing torch from a slow disk needs a minute."""

T = TypeVar("T")


class PredictorProxy:
    """Asks the predictor, whichever it is by now, and keeps what the next one would have to know.

    Nothing is in the predictor alone: the frames are with the source until their scan is saved, the versions in the
    store, the policy comes with each of its answers, and what was said of a frame is noted here. A question that a lost
    predictor has not answered is put to the next one, once; what the lost one still says is not heard. One loss is one
    PredictorReplaced, emitted once, however many questions notice.
    """

    def __init__(
        self,
        client: Client,
        description: Predictor,
        handle: ActorHandle,
        source: SourceProxy,
        *,
        emit: Callable[[Event], None],
        base: ResumeState | None = None,
    ) -> None:
        """description: what every predictor is made of. handle: the first one, not started. emit: where
        PredictorReplaced and FramesLost go. base: what the first one goes on from; None: it begins."""
        self.number = 0
        """How many predictors were lost before this one."""
        self._client = client
        self._description = description
        self._handle = handle
        self._source = source
        self._emit = emit
        self._answer: PolicyAnswer | None = None
        self._base = base
        """From the newest checkpoint: the next predictor goes on from it."""
        self._version = 0 if base is None else base.version
        """In service at the predictor."""
        self._told: defaultdict[str, Ids] = defaultdict(Ids)
        """Frames of each scan, those that were let go of left out, whose prediction is known."""
        self._told_aside: defaultdict[str, Ids] = defaultdict(Ids)
        """And those that are known to be set aside."""
        self._answers = Answers(() if base is None else base.answered)
        self._predicted: defaultdict[str, dict[int, int]] = defaultdict(dict)
        self._aside: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._over: list[str] = [] if base is None else list(base.over)
        self._replaced = asyncio.Event()
        """Set when the predictor that is asked now is given up."""
        self._released = False
        self._changing = asyncio.Lock()
        """Held while another predictor is made ready."""

    async def start(self) -> None:
        """Bring the first predictor to life."""
        await call(self._handle.actor, "start", self._base)
        if self._base is not None:
            for scan, before in self._base.reported.items():
                self._told[scan].update(before)
            for scan, before in self._base.aside_before.items():
                self._told_aside[scan].update(before)
            for scan, known in self._base.predicted.items():
                self._predicted[scan].update(known)
                self._told[scan].add(known)
            for scan, aside in self._base.aside.items():
                self._aside[scan] = Counter(aside)
                self._told_aside[scan].add(aside)

    @property
    def over(self) -> tuple[str, ...]:
        """Scans that are forgotten, see `let_go`."""
        return tuple(self._over)

    def told(self) -> dict[str, dict[str, list[list[int]]]]:
        """Of each scan that was not let go of, the ids of the frames that were reported so far as predicted
        (`reported`) and as set aside (`aside`), as `Ids.of` reads them."""
        parts = {"reported": self._told, "aside": self._told_aside}
        return {
            name: {scan: [list(each) for each in ids.ranges] for scan, ids in part.items()}
            for name, part in parts.items()
        }

    def rebase(self, saved: SavedPredictor, told: Mapping[str, Mapping[str, list[list[int]]]]) -> None:
        """From now on another predictor goes on from this. told: as `told` returned it when it was written."""
        self._base = ResumeState(saved=saved, reported=read_told(told["reported"]))

    @property
    def address(self) -> str:
        """Of its worker."""
        return self._handle.address

    @property
    def replacing(self) -> bool:
        """Whether another predictor is being made ready."""
        return self._changing.locked()

    async def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """The predictor's answer. Raises what the predictor raised, and LostForGood where nothing can replace it."""
        return await self.outlived(lambda predictor: call(predictor, method, *arguments, **named))

    async def outlived(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """The result of work that asks the predictor itself, given its actor; where that is lost meanwhile the work is
        given up, for it may wait for ever, and done again with the next one. Raises what the work raised."""
        while True:
            async with self._changing:
                actor, number, replaced = self._handle.actor, self.number, self._replaced
            answer = asyncio.ensure_future(work(actor))
            over = asyncio.ensure_future(replaced.wait())
            try:
                await asyncio.wait({answer, over}, return_when=asyncio.FIRST_COMPLETED)
                if not replaced.is_set():
                    return answer.result()
            except Exception:
                if not await self.replaced(number):
                    raise
            finally:
                over.cancel()
                answer.cancel()
                answer.add_done_callback(retrieved)

    async def suggest(self, asked: AskPolicy) -> DecisionSuggested:
        """The policy's answer, once it knows what was declined of its earlier ones, and why its scan was ended."""
        parts = [(each.decision, each.reason) for each in asked.declined]
        answer: PolicyAnswer = await self.ask("suggest", asked.positions, parts, asked.ended, action=asked.id)
        self._answer = answer.following(self._answer)
        self._answers.note(answer)
        return answer.decision

    async def install(self, number: int, **settings: Any) -> Installed:
        """Put a version into service if the predictor accepts it, see Predictor.install."""
        installed: Installed = await self.ask("install", number, **settings)
        self._version = installed.version
        return installed

    async def events(self) -> list[Event]:
        """What has happened at the predictor since the last call; waits until there is something."""
        events: list[Event] = await self.ask("events")
        for event in events:
            match event:
                case PredictionReady(scan=scan, frame_ids=ids, version=version):
                    self._predicted[scan].update(dict.fromkeys(ids, version))
                    self._told[scan].add(ids)
                case FrameSetAside(scan=scan, frame_ids=ids):
                    self._aside[scan].update(ids)
                    self._told_aside[scan].add(ids)
        return events

    async def let_go(self, scan: str) -> None:
        """Forget a scan that is over, saved, and reported whole: the next predictor need not know its frames."""
        self._over.append(scan)
        for part in (self._predicted, self._aside, self._told, self._told_aside):
            part.pop(scan, None)
        await self._source.let_go(scan)

    async def close(self) -> None:
        """Release the predictor: the run has ended, and nobody takes its place."""
        self._released = True
        await release(self._client, self._handle, "close")

    async def replaced(self, number: int) -> bool:
        """Replace the predictor of this number if it is lost; False where it is not. True where it is replaced already.

        Raises LostForGood where none can.
        """
        handle, begun = self._handle, time.perf_counter()
        if self._released:
            return False
        # Nobody else has to wait while this is found out: most errors are no losses.
        if self.number == number and not await losses(self._client, [handle]):
            return self.number != number
        await self._succeeded(number, begun)
        return True

    async def move(self) -> None:
        """Have another predictor take the place of this one, whose worker is about to end, before that. Raises
        LostForGood."""
        handle = self._handle
        if not self._released:
            await self._succeeded(self.number, time.perf_counter())
            await release(self._client, handle, "close")

    async def _succeeded(self, number: int, begun: float) -> None:
        """Have another predictor take the place of the one of this number, unless one has by now."""
        async with self._changing:
            if self.number != number:
                return
            self._replaced.set()
            try:
                frames = await self._replace()
            except TimeoutError:
                raise LostForGood(
                    f"found no predictor ready {_READY_S:.0f} s after one was lost, expected one within that time: "
                    "look at the log of the worker with the role inference"
                ) from None
            except Exception as error:
                raise LostForGood(f"the predictor is lost, and none can take its place: {error}") from error
            finally:
                self._replaced = asyncio.Event()
            self._emit(PredictorReplaced(time=time.time(), frames=frames, seconds=time.perf_counter() - begun))

    async def _replace(self) -> int:
        """Start another predictor, and have the source send it the frames. Returns how many were sent again."""
        attempts = 0
        while True:
            attempts += 1
            resume = ResumeState(
                version=self._version,
                answer=self._answer,
                answered=tuple(self._answers.kept),
                predicted={scan: dict(known) for scan, known in self._predicted.items()},
                aside={scan: Counter(ids) for scan, ids in self._aside.items()},
                over=tuple(self._over),
                saved=None if self._base is None else self._base.saved,
                reported={} if self._base is None else self._base.reported,
            )
            worker = await self._worker()
            try:
                work = while_there(self._client, worker, self._begin(worker, resume))
                return await asyncio.wait_for(work, _READY_S)
            except TimeoutError:
                raise
            except Exception:
                if attempts == _ATTEMPTS or worker in await workers_now(self._client):
                    raise

    async def _begin(self, worker: str, resume: ResumeState) -> int:
        handle = await place(self._client, self._description, worker=worker)
        await call(handle.actor, "start", resume)
        frames = await self._source.go_on_with(handle.actor, self.number + 1)
        self._handle = handle
        self.number += 1
        there = Ids() if resume.saved is None else resume.saved.frame_ids
        there.add(frames)
        self._miss(there)
        return len(frames)

    def _miss(self, there: Ids) -> None:
        """Report the frames that the lost predictor had and the next one lacks, once: the source could not send them
        again, and no checkpoint has them. there: ids of those that it has."""
        for scan, known in self._predicted.items():
            missing = tuple(sorted(i for i in known if i not in there and i not in self._source.lost))
            if missing and scan not in self._over:
                for each in missing:
                    del known[each]
                reason = "the predictor was lost after the source was, which had kept them"
                self._emit(FramesLost(time=time.time(), scan=scan, frame_ids=missing, reason=reason))

    def reported(self) -> dict[str, set[int]]:
        """Ids of the frames of each scan, those that were let go of left out, that were reported so far."""
        return {scan: {*self._predicted[scan], *self._aside[scan]} for scan in (*self._predicted, *self._aside)}

    async def _worker(self) -> str:
        """Address of a worker that can take the predictor, when there is one again: who watches over the lost worker
        starts another."""
        found = await worker_for(self._client, INFERENCE, _RESTART_S)
        if found is not None:
            return found
        raise RuntimeError(
            f"found no worker with the resource {INFERENCE} within {_RESTART_S:.0f} s of the loss of one, expected "
            f'another: start workers under a nanny, or a second one with --resources "{INFERENCE}=1"'
        )


def read_told(part: Mapping[str, list[list[int]]]) -> dict[str, Ids]:
    """Ids by scan as `PredictorProxy.told` says them. Raises ValueError for anything else."""
    if not isinstance(part, Mapping):
        raise ValueError(f"found {part!r:.80}, expected ranges of ids by scan")
    return {str(scan): Ids.of(ranges) for scan, ranges in part.items()}
