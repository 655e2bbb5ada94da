"""When the predictor's worker is lost another takes its place, and the campaign goes on where it was."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, get_client

from steering.campaign import DecisionSuggested, Event, FrameSetAside, PredictionReady, PredictorReplaced
from steering.inference import Installed, PolicyAnswer, ResumeState
from steering.runner.actors import Actors, call

_ATTEMPTS = 3
"""Losses in a row, without a word about any further frame in between, after which it is not chance."""
_READY_S = 300.0
"""How long the next predictor may take to be there, as at the start of a run."""


@dataclass(kw_only=True)
class PredictorProxy:
    """Asks the predictor, whichever it is by now, and keeps what the next one would have to know.

    Nothing that decides lives in the predictor alone: the frames are with the source until their scan is saved, the
    versions in the store, the policy comes with each of its answers, and what was told of a frame is noted here. A
    question that a lost predictor has not answered is put to the next one. What it says after it was given up is not
    heard.
    """

    actors: Actors
    emit: Callable[[Event], None]
    """Where events go."""
    _answer: PolicyAnswer | None = None
    _version: int = 0
    """In service at the predictor."""
    _predicted: defaultdict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    _aside: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    _over: list[str] = field(default_factory=list)
    _given_up: asyncio.Event = field(default_factory=asyncio.Event)
    """Of the predictor that is asked now."""
    _making: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while another predictor is made ready."""
    _losses: int = 0
    """In a row."""
    _end: Exception | None = None
    """Why nothing is asked any more."""
    _closed: bool = False

    @property
    def replacing(self) -> bool:
        """Whether another predictor is being made ready."""
        return self._making.locked()

    async def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """The predictor's answer. Raises what the predictor raised, and RuntimeError where it is lost for good."""
        while True:
            async with self._making:
                self._go_on()
                predictor, number, given_up = self.actors.predictor, self.actors.predictor_number, self._given_up
            answer = asyncio.ensure_future(call(predictor, method, *arguments, **named))
            over = asyncio.ensure_future(given_up.wait())
            try:
                await asyncio.wait({answer, over}, return_when=asyncio.FIRST_COMPLETED)
                if not given_up.is_set():
                    return answer.result()
            except Exception:
                if not await self.replaced(number):
                    raise
            finally:
                over.cancel()
                answer.cancel()
                answer.add_done_callback(_looked_at)

    async def suggest(self, positions: int) -> DecisionSuggested:
        """The policy's answer."""
        answer: PolicyAnswer = await self.ask("suggest", positions)
        self._answer = answer.following(self._answer)
        return answer.decision

    async def install(self, number: int, **settings: Any) -> Installed:
        """What came of the wish to put a version into service, see Predictor.install."""
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
                    self._losses = 0
                case FrameSetAside(scan=scan, frame_ids=ids):
                    self._aside[scan].update(ids)
        return events

    async def let_go(self, scan: str) -> None:
        """A scan is over, saved, and all of it was told: a predictor that starts again need not know its frames."""
        self._over.append(scan)
        await self.actors.source.let_go(scan)
        self._predicted.pop(scan, None)
        self._aside.pop(scan, None)

    def close(self) -> None:
        """The run has ended: who is there still answers, and nobody is replaced any more."""
        self._closed = True

    async def replaced(self, number: int) -> bool:
        """See to it that another sits where the predictor of this number sat, if it is lost; False where it is not.

        Raises RuntimeError where none can.
        """
        async with self._making:
            self._go_on()
            if self.actors.predictor_number != number:
                return True
            if self._closed:
                return False
            client, begun = get_client(), time.perf_counter()
            if not await self.actors.predictor_lost(client):
                return False
            self._given_up.set()
            try:
                self._count()
                frames = await asyncio.wait_for(self._replace(client), _READY_S)
            except TimeoutError as late:
                self._end = RuntimeError(
                    f"found no predictor ready {_READY_S:.0f} s after one was lost, expected one within that time: "
                    "look at the log of the worker with the role inference"
                )
                raise self._end from late
            except Exception as error:
                self._end = error
                raise
            self._given_up = asyncio.Event()
            self.emit(PredictorReplaced(time=time.time(), frames=frames, seconds=time.perf_counter() - begun))
            return True

    def _go_on(self) -> None:
        if self._end is not None:
            raise self._end

    def _count(self) -> None:
        self._losses += 1
        if self._losses > _ATTEMPTS:
            raise RuntimeError(
                f"found the predictor lost {self._losses} times in a row at the same place, expected one that lives: "
                "look at the log of the worker with the role inference, and at its memory"
            )

    async def _replace(self, client: Client) -> int:
        attempts = 0
        while True:
            attempts += 1
            resume = ResumeState(
                version=self._version,
                answer=self._answer,
                predicted={scan: dict(known) for scan, known in self._predicted.items()},
                aside={scan: Counter(ids) for scan, ids in self._aside.items()},
                over=tuple(self._over),
            )
            try:
                return await self.actors.replace_predictor(client, resume)
            except Exception:
                if attempts == _ATTEMPTS or not await self.actors.predictor_lost(client):
                    raise


def _looked_at(call: asyncio.Future) -> None:
    """An answer that nobody waits for any more may be an error: that is no news."""
    if not call.cancelled():
        call.exception()
